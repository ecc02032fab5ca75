"""Answers from planned prompts: batched, streamed, with stop strings, from tokens, soft slots and KV slots alike."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .plan import KV, Layout, Prompt, PromptPlan

if TYPE_CHECKING:
    from .reader import Reader

_END = object()
_OVERLAP = 32  # tokens of context in which a new one is decoded


class Generator:
    """What `Reader.generate` and `Reader.stream` do."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 32,
        *,
        chat: bool = False,
        stop: Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        batch_size: int | None = None,
        template: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> list[str]:
        """Answers prompts.

        Args:
            prompts: each a string or a list of strings and compressed passages; or all of them as `Reader.plan` laid
                them out, where ``chat`` and ``template`` have been heeded already.
            max_new_tokens: the longest answer, in tokens.
            chat: render each prompt through the chat template.
            stop: strings that end an answer; they are no part of it.
            generation_config: default: greedy.
            batch_size: prompts at a time, in order of length so that little is padded; default: all together.
            template: options of the chat template.
            generate_kwargs: passed to ``model.generate`` (``do_sample``, ``temperature``, ``num_beams``, ...).

        Raises:
            ValueError: if a prompt and its answer do not fit the model's positions.
        """
        plans = self._plan(prompts, chat, template)
        order = sorted(range(len(plans)), key=lambda i: len(plans[i]))
        answers = [""] * len(plans)
        step = batch_size or max(len(plans), 1)
        config = self._config(max_new_tokens, generation_config, generate_kwargs)
        for start in range(0, len(order), step):
            part = order[start : start + step]
            new = self._run([plans[i] for i in part], config, stop, generate_kwargs)
            for i, ids in zip(part, new):
                answers[i] = cut_at_stop(self.reader.decode(ids), stop)[0]
        return answers

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 32,
        *,
        chat: bool = False,
        stop: Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        template: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> Iterator[str]:
        """Pieces of one answer as soon as they are final; joined they are what `generate` gives. Arguments as there.

        The model runs in a thread of its own, which ends when the iterator is closed; its errors are raised here.
        """
        plans = self._plan([prompt], chat, template)
        config = self._config(max_new_tokens, generation_config, generate_kwargs)
        if (config.num_beams or 1) > 1:
            raise ValueError("Beam search cannot be streamed: its tokens are final only at the end. Use generate.")
        self.reader.check_room(plans, max_new_tokens)
        return self._stream(plans, config, stop, generate_kwargs)

    def _plan(self, prompts: Sequence[Prompt], chat: bool, template: dict[str, Any] | None) -> list[PromptPlan]:
        planned = [prompt for prompt in prompts if isinstance(prompt, PromptPlan)]
        if planned and len(planned) == len(prompts):
            return planned
        return self.reader.plan(prompts, chat=chat, **(template or {}))

    def _stream(
        self, plans: list[PromptPlan], config: GenerationConfig, stop: Sequence[str] | None, kwargs: dict[str, Any]
    ) -> Iterator[str]:
        tokens: queue.Queue[Any] = queue.Queue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                with torch.no_grad():
                    self._run(plans, config, stop, kwargs, _QueueStreamer(tokens), _Cancelled(cancelled))
                tokens.put(_END)
            except BaseException as error:
                tokens.put(error)

        thread = threading.Thread(target=work, name="nutgraf-stream", daemon=True)
        thread.start()
        written = _Written(self.reader.decode)
        sent = 0
        try:
            while (item := tokens.get()) is not _END:
                if isinstance(item, BaseException):
                    raise item
                written.add(item)
                text, stopped = cut_at_stop(written.text, stop)
                # A character may still lack bytes, and the tail may be the beginning of a stop string.
                final = len(text) if stopped else len(text.rstrip("�")) - held_back(text, stop)
                if final > sent:
                    yield text[sent:final]
                    sent = final
                if stopped:
                    return
            text = cut_at_stop(self.reader.decode(written.ids), stop)[0]
            if len(text) > sent:
                yield text[sent:]
        finally:
            cancelled.set()
            thread.join()

    def _config(self, max_new_tokens: int, given: GenerationConfig | None, kwargs: dict[str, Any]) -> GenerationConfig:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        config = copy.deepcopy(given) if given is not None else GenerationConfig(do_sample=False, num_beams=1)
        for key in [k for k in kwargs if hasattr(config, k)]:
            setattr(config, key, kwargs.pop(key))
        config.max_new_tokens = max_new_tokens
        config.max_length = None
        if (config.num_return_sequences or 1) != 1:
            raise ValueError("generate returns one answer a prompt; repeat the prompt to get several.")
        eos = self.reader.eos_ids
        config.eos_token_id = config.eos_token_id if config.eos_token_id is not None else (eos or None)
        if config.pad_token_id is None:
            pad = getattr(self.reader.tokenizer, "pad_token_id", None)
            config.pad_token_id = pad if pad is not None else (eos[0] if eos else 0)
        return config

    def _run(
        self,
        plans: list[PromptPlan],
        config: GenerationConfig,
        stop: Sequence[str] | None,
        kwargs: dict[str, Any],
        streamer: BaseStreamer | None = None,
        extra_criteria: StoppingCriteria | None = None,
    ) -> list[list[int]]:
        """New token ids of each prompt, end-of-sequence and padding cut off."""
        reader = self.reader
        reader.check_room(plans, config.max_new_tokens)
        options: dict[str, Any] = dict(kwargs)
        if stop:
            config.stop_strings = list(stop)
            options["tokenizer"] = reader.tokenizer
        if extra_criteria is not None:
            options["stopping_criteria"] = StoppingCriteriaList([extra_criteria])
        inputs, skip = self._inputs(plans, config)
        out = reader.model.generate(**inputs, generation_config=config, streamer=streamer, **options)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        return [cut_at_end(row, ends) for row in out[:, skip:].tolist()]

    def _inputs(self, plans: list[PromptPlan], config: GenerationConfig) -> tuple[dict[str, Any], int]:
        """Arguments for ``model.generate``, and how many ids of its output repeat the prompt."""
        reader = self.reader
        if not any(plan.kv for plan in plans):
            layout = Layout.of(plans, reader.device, reader.dtype)
            mask = layout.valid.long()
            if layout.soft is None:
                ids = layout.ids.masked_fill(~layout.valid, int(config.pad_token_id))  # type: ignore[arg-type]
                return {"input_ids": ids, "attention_mask": mask}, ids.shape[1]
            inputs = {"inputs_embeds": layout.splice(reader.embed), "attention_mask": mask}
            if any(plan.placeless for plan in plans):
                inputs["position_ids"] = layout.positions
            return inputs, 0
        return self._kv_inputs(plans, config), 0

    def _kv_inputs(self, plans: list[PromptPlan], config: GenerationConfig) -> dict[str, Any]:
        reader = self.reader
        if any(plan.kinds[-1] == KV for plan in plans):
            raise ValueError("A prompt must not end with a KV passage: add the text that asks for an answer after it.")
        reader.kv_placement.check_length(max(map(len, plans)) + int(config.max_new_tokens or 0))
        # Everything but the last position is run here, under a mask in logical order that generate does not take;
        # generate feeds the last position and goes on: it sees every slot and token, so a flat mask is enough.
        _, layout, cache, kv_at = reader.forward(plans, drop_last=True, use_cache=True)
        kv_positions: Any = kv_at
        kv_valid: Tensor = kv_positions >= 0
        slots = kv_valid.shape[1]
        mask = torch.cat([kv_valid, layout.valid], dim=1).long()
        embeds = layout.splice(reader.embed)
        dummies = embeds.new_zeros(embeds.shape[0], slots, embeds.shape[2])  # generate counts the cache in
        positions = torch.cat([kv_positions.clamp(min=0), layout.positions], dim=1)
        if (config.num_beams or 1) > 1:
            cache.batch_repeat_interleave(config.num_beams)  # type: ignore[union-attr]
        return {
            "inputs_embeds": torch.cat([dummies, embeds], dim=1),
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
        }


class _Written:
    """The text of ids that come one by one; only the last ones are decoded again with each.

    Attributes:
        ids: all ids so far.
        text: their text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._decode = decode
        self._start = 0  # the ids from here on are decoded with each new one
        self._before = 0  # characters of the text that come before theirs

    def add(self, token: int) -> None:
        """One more id."""
        self.ids.append(token)
        self.text = self.text[: self._before] + self._decode(self.ids[self._start :])
        if len(self.ids) - self._start >= 2 * _OVERLAP:
            tail = self._decode(self.ids[-_OVERLAP:])
            # Bytes of a character may be split here, or the tail be decoded otherwise on its own: then a later cut.
            if tail and self.text.endswith(tail):
                self._start, self._before = len(self.ids) - _OVERLAP, len(self.text) - len(tail)


class _QueueStreamer(BaseStreamer):
    def __init__(self, tokens: queue.Queue[Any]) -> None:
        self.tokens = tokens
        self.prompt = True

    def put(self, value: Tensor) -> None:
        ids = value.reshape(-1).tolist()
        # generate first puts the prompt's ids: none when the prompt came as embeddings
        if self.prompt:
            self.prompt = False
            if value.dim() > 1:
                return
        for i in ids:
            self.tokens.put(i)

    def end(self) -> None:
        pass


class _Cancelled(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def cut_at_end(ids: list[int], ends: Sequence[int | None]) -> list[int]:
    """Ids up to the first end-of-sequence token."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids


def cut_at_stop(text: str, stop: Sequence[str] | None) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there was one."""
    found = [at for s in stop or () if (at := text.find(s)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def held_back(text: str, stop: Sequence[str] | None) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    longest = 0
    for s in stop or ():
        for n in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:n]):
                longest = n
                break
    return longest
