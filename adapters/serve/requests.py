"""Requests in OpenAI's format, validated and turned into prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...compressors import CompressedPassage, Reader
from ...compressors.reader.generation import stop_strings
from ...compressors.reader.plan import KV, PromptPlan
from ...compressors.reader.tokenization import TokenIds
from .batching import AnswerOptions
from .errors import RequestError
from .limits import Limits
from .passages import PassageRef
from .tensors import decode_embeds

_LABELS = {
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "cache_salt",
    "request_id",
    "rid",
}  # change no answer anywhere
_UNSERVED: dict[
    str, tuple[Any, ...]
] = {  # parameters of OpenAI, vLLM and SGLang, accepted at values that ask for nothing
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "early_stopping": (None, False),
    "ebnf": (None,),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "guided_choice": (None, []),
    "guided_decoding_backend": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "ignore_eos": (None, False),
    "include_stop_str_in_output": (None, False),
    "json_schema": (None,),
    "kv_transfer_params": (None, {}),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logits_processors": (None, []),
    "logprobs": (None, False),
    "lora_path": (None,),
    "metadata": (None, {}),
    "min_tokens": (None, 0),
    "n": (None, 1),
    "no_stop_trim": (None, False),
    "presence_penalty": (None, 0),
    "priority": (None, 0),
    "prompt_logprobs": (None, False),
    "regex": (None,),
    "response_format": (None, {"type": "text"}),
    "return_hidden_states": (None, False),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "service_tier": (None, "auto", "default"),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "stop_token_ids": (None, []),
    "store": (None, False),
    "structured_outputs": (None, {}),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
}
_UNSERVED_COMPLETION: dict[str, tuple[Any, ...]] = {"add_special_tokens": (None, True), "suffix": (None, "")}
_UNSERVED_CHAT: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (None, False),
    "audio": (None,),
    "chat_template": (None,),
    "documents": (None, []),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {
    "include_usage": (None, True, False),
    "include_obfuscation": (None, False),
    "continuous_usage_stats": (None, False),
}
_TEMPLATE_OPTIONS = {"add_generation_prompt", "continue_final_message"}  # of the tokenizer, whatever the template


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)  # `parse` refuses other names
    unserved: ClassVar[dict[str, tuple[Any, ...]]] = _UNSERVED

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = None
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    def wants_usage(self) -> bool:
        """Whether a stream should end with token counts."""
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(_Request):
    """``/v1/completions``: text, token ids, prompt embeddings, or one prompt as a list of parts as in chats."""

    unserved = _UNSERVED | _UNSERVED_COMPLETION
    prompt: str | list[str] | list[int] | list[list[int]] | list[dict[str, Any]] | None = None
    prompt_embeds: str | list[str] | None = None


class ChatRequest(_Request):
    """``/v1/chat/completions``: messages of text, prompt embeddings and passages."""

    unserved = _UNSERVED | _UNSERVED_CHAT
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


def check_model(kind: type[Any], data: Any) -> Any:
    """Make a model of a request's JSON. Raises ``RequestError`` with the field that is wrong."""
    if not isinstance(data, dict):
        raise RequestError(f"A request must be a JSON object, got {type(data).__name__}.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(str(step) for step in first["loc"])
        raise RequestError(f"{where or 'The request'}: {first['msg']}.", 400, field) from error


def parse(kind: type[Any], data: Any) -> Any:
    """Validate a request. Raises ``RequestError`` with the field that is wrong or not supported."""
    request = check_model(kind, data)
    _refuse_others({n: v for n, v in data.items() if n not in kind.model_fields and n not in _LABELS}, kind.unserved)
    _refuse_others(request.stream_options or {}, _STREAM_OPTIONS, "stream_options.")
    if request.stream_options and not request.stream:
        raise RequestError("stream_options are for streams; leave them out, or set stream.", 400, "stream_options")
    return request


def _refuse_others(given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    for name, value in given.items():
        if name not in allowed:
            raise RequestError(f"{where}{name:.60} is no parameter that is served here; leave it out.", 400, name)
        if value not in allowed[name]:
            raise RequestError(f"{where}{name}={value!r:.60} is not served here; leave it out.", 400, name)


class Prompts:
    """Turns requests into planned prompts for a reader, within limits.

    Args:
        reader: reads the prompts.
        limits: limits of requests.
        resolve: returns the compressed passages that a prompt names; see `Passages.resolve`.
    """

    def __init__(
        self,
        reader: Reader,
        limits: Limits,
        resolve: Callable[[Sequence[PassageRef], str], Mapping[PassageRef, CompressedPassage]],
    ) -> None:
        self.reader = reader
        self.limits = limits
        self.resolve = resolve
        known = [n for n in (reader.max_positions, limits.max_positions) if n is not None]
        self.max_positions = min(known, default=32_768)

    def of_completion(self, request: CompletionRequest) -> list[PromptPlan]:
        """Plan the prompts of a completion; embeddings come first, as in vLLM."""
        embeds = request.prompt_embeds if isinstance(request.prompt_embeds, list) else [request.prompt_embeds]
        given: list[Any] = [self._embeds(data, "prompt_embeds") for data in embeds if data is not None]
        prompt = request.prompt
        if isinstance(prompt, str):
            texts: list[Any] = [prompt] if prompt or not given else []  # OpenAI's client always sends a prompt
        elif prompt and isinstance(prompt[0], int):
            texts = [prompt]
        elif prompt and isinstance(prompt[0], dict):
            texts = []
            given += self._resolved([self._content(prompt, "prompt", "prompt")], "prompt")
        else:
            texts = list(prompt or [])
        if len(given) + len(texts) > self.limits.max_prompts:
            raise RequestError(
                f"A request may hold {self.limits.max_prompts} prompts, got {len(given) + len(texts)}.", 400, "prompt"
            )
        prompts: list[Any] = [one if isinstance(one, list) else [TokenIds(()), one] for one in given]
        prompts += [text if isinstance(text, str) else [TokenIds(tuple(text))] for text in texts]
        if not prompts:
            raise RequestError("A completion needs a prompt or prompt_embeds.", 400, "prompt")
        return self._plan(prompts, request.max_tokens, "prompt")

    def of_chat(self, request: ChatRequest) -> list[PromptPlan]:
        """Plan the prompt of a chat."""
        messages: list[dict[str, Any]] = []
        for i, message in enumerate(request.messages):
            if not isinstance(message.get("role"), str):
                raise RequestError(f"messages.{i} needs a role.", 400, "messages")
            given = {name: value for name, value in message.items() if value is not None}
            for name in given.keys() - {"role", "content"}:
                self._check_read(name, f"messages.{i}.{name:.60}", "messages")
            content = self._content(message.get("content"), f"messages.{i}.content", "messages")
            messages.append({**given, "content": content})
        contents = self._resolved([message["content"] for message in messages], "messages")
        messages = [{**message, "content": content} for message, content in zip(messages, contents)]
        options = dict(request.chat_template_kwargs or {})
        for name in options.keys() - _TEMPLATE_OPTIONS:
            self._check_read(name, f"chat_template_kwargs.{name:.60}", "chat_template_kwargs")
        for name in _TEMPLATE_OPTIONS:
            if getattr(request, name) is not None:
                options[name] = getattr(request, name)
        if reserved := sorted(options.keys() & {"tokenize", "return_tensors", "return_dict", "chat_template", "chat"}):
            raise RequestError(f"chat_template_kwargs must not set {reserved}.", 400, "chat_template_kwargs")
        asked = {n for n in (request.max_completion_tokens, request.max_tokens) if n is not None}
        if len(asked) > 1:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them.", 400, "max_tokens")
        return self._plan([messages], next(iter(asked), None), "messages", options)

    def _check_read(self, name: str, where: str, param: str) -> None:
        """Refuse what the chat template does not mention, and would ignore."""
        template = getattr(self.reader.tokenizer, "chat_template", None)
        sources = template.values() if isinstance(template, dict) else [template or ""]
        if template and not any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources):
            raise RequestError(f"{where} is not read by this model's chat template; leave it out.", 400, param)

    def options(self, request: _Request, plans: list[PromptPlan]) -> AnswerOptions:
        """Return the options of the answers."""
        asked = getattr(request, "max_completion_tokens", None) or request.max_tokens
        most = max(1, min(self.limits.max_new_tokens, self._positions(plans) - max(map(len, plans))))
        default = 16 if isinstance(request, CompletionRequest) else most  # OpenAI's
        temperature = 1.0 if request.temperature is None else request.temperature
        sampled: dict[str, Any] = {}
        if request.repetition_penalty not in (None, 1.0):
            if any(plan.soft or plan.kv for plan in plans):
                raise RequestError(
                    "repetition_penalty counts the prompt's tokens, which compressed passages do not have; leave it out.",
                    400,
                    "repetition_penalty",
                )
            sampled["repetition_penalty"] = request.repetition_penalty
        if temperature > 0:
            if request.seed is not None:
                raise RequestError(
                    "seed is not served: answers are sampled in batches; use temperature=0 for the same answer each time.",
                    400,
                    "seed",
                )
            sampled |= {"do_sample": True, "temperature": temperature, "top_k": 0}
            for name in ("top_p", "min_p"):
                if getattr(request, name) is not None:
                    sampled[name] = getattr(request, name)
            if request.top_k is not None and request.top_k > 0:
                sampled["top_k"] = request.top_k
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if len(stop) > 16 or any(not s or len(s) > 256 for s in stop):
            raise RequestError("stop takes up to 16 strings of 1 to 256 characters.", 400, "stop")
        try:
            stop_strings(stop)
        except ValueError as error:
            raise RequestError(str(error), 400, "stop") from error
        return AnswerOptions(min(asked or default, most), tuple(stop), tuple(sorted(sampled.items())))

    def _content(self, content: Any, where: str, param: str) -> list[Any]:
        """Strings, soft passages from the client, and references to passages."""
        if content is None or isinstance(content, str):
            return [content or ""]
        if not isinstance(content, list):
            raise RequestError(f"{where} must be a string or a list of parts.", 400, param)
        atoms: list[Any] = []
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            field = {"text": "text", "prompt_embeds": "data"}.get(kind) if isinstance(kind, str) else None
            if field and (other := [n for n, v in part.items() if n not in ("type", field) and v is not None]):
                raise RequestError(f"{where}.{i}.{other[0]:.60} is not served here; leave it out.", 400, param)
            if kind == "text" and isinstance(part.get("text"), str):
                atoms.append(part["text"])
            elif kind == "passage":
                atoms.append(PassageRef.of(part, f"{where}.{i}", param))
            elif kind == "prompt_embeds":
                atoms.append(self._embeds(part.get("data"), f"{where}.{i}.data"))
            else:
                raise RequestError(
                    f"{where}.{i} must be a text, a passage or a prompt_embeds part, got {kind!r:.60}.", 400, param
                )
        return atoms

    def _resolved(self, contents: list[list[Any]], param: str) -> list[list[Any]]:
        """The contents with the passages that they name."""
        refs = [atom for atoms in contents for atom in atoms if isinstance(atom, PassageRef)]
        if len(refs) > self.limits.max_passages:
            raise RequestError(f"A request may name {self.limits.max_passages} passages, got {len(refs)}.", 400, param)
        found = self.resolve(refs, param) if refs else {}
        return [[found[atom] if isinstance(atom, PassageRef) else atom for atom in atoms] for atoms in contents]

    def _embeds(self, data: Any, param: str) -> CompressedPassage:
        embeds = decode_embeds(data, self.reader.width, self.max_positions, param=param)
        return CompressedPassage("embeds", len(embeds), "client", self.reader.fingerprint, embeds=embeds)

    def _plan(
        self, prompts: list[Any], asked: int | None, param: str, template: dict[str, Any] | None = None
    ) -> list[PromptPlan]:
        if asked is not None and asked > self.limits.max_new_tokens:
            raise RequestError(
                f"An answer may have {self.limits.max_new_tokens} tokens, {asked} were asked for.", 400, "max_tokens"
            )
        try:
            plans = self.reader.plan(prompts, chat=param == "messages", **(template or {}))
        except (ValueError, TypeError) as error:
            raise RequestError(str(error), 400, param) from error
        except Exception as error:  # chat templates may raise anything
            raise RequestError(f"The chat template refuses the messages: {error}", 400, param) from error
        if any(plan.kinds[-1] == KV for plan in plans):
            raise RequestError("A prompt must not end with a passage: put the question after it.", 400, param)
        longest, most = max(map(len, plans)), self._positions(plans)
        if longest + (asked or 1) > most:
            raise RequestError(
                f"The prompt takes {longest} positions and {asked or 1} more are asked for, but there are {most}; "
                "shorten it.",
                400,
                param,
            )
        return plans

    def _positions(self, plans: Sequence[PromptPlan]) -> int:
        """Positions that prompts and their answers may take; keys and values may allow fewer than tokens."""
        limit = self.reader.kv_placement.max_length if any(plan.kv for plan in plans) else None
        return self.max_positions if limit is None else min(limit, self.max_positions)
