"""How much more memory selection takes than one forward of the same tokens, at a large vocabulary.

Run as a process of its own, which prints one JSON line: the high-water mark of the process, set back before each run, is
what both sides are measured by. The forward is that of the model's body alone, in the same batches and without any logits,
so that everything that selecting adds counts: logits, losses, tokens, units, texts.
"""

from __future__ import annotations

import json
import statistics
from typing import Annotated, Any

import torch
import typer

from ...compressors.text.llmlingua import LLMLinguaCompressor, LLMLinguaConfig
from ..rows import Row, clean, provenance
from ..speed.clock import peak_memory
from ..speed.entrants import make_passages

LAYERS, HIDDEN, MLP, HEADS = 2, 128, 384, 2


def measure_memory(tokens: int, vocabulary: int, passages: int = 1, repeats: int = 3, threads: int = 1) -> Row:
    """The row of LLMLingua (`fast`) over so many tokens with so many entries in the vocabulary.

    Raises:
        ValueError: where the system does not tell a process's high-water mark (it is Linux that does), or the vocabulary is
            smaller than that of the shipped tokenizer.
    """
    torch.set_num_threads(threads)
    reader = _reader(vocabulary)
    compressor = LLMLinguaCompressor(LLMLinguaConfig(), reader)
    texts = make_passages(reader, passages, tokens // passages)
    rows = _rows(compressor, texts)

    def select() -> None:
        compressor.compress(texts)

    def forward() -> None:
        with torch.no_grad():
            for ids in rows:
                reader.model.get_decoder()(input_ids=ids, use_cache=False)

    forward()
    select()
    extra = []
    for _ in range(repeats):
        before, after = peak_memory(reader.device, forward), peak_memory(reader.device, select)
        if before is None or after is None:
            raise ValueError("This system does not tell a process's high-water mark (/proc/self/clear_refs).")
        extra.append(after - before)
    about: Row = {
        "suite": "selection",
        "test": "memory",
        "method": "llmlingua",
        "mode": "fast",
        "model_shape": f"{type(reader.model).__name__} {LAYERS}x{HIDDEN}, vocabulary {vocabulary}",
        "weights": "random",
        "tokens": tokens,
        "passages": passages,
        "vocabulary": vocabulary,
        "threads": threads,
        "repeats": repeats,
        "extra_bytes": round(statistics.median(extra)),
        "logits_bytes": 4 * tokens * vocabulary,
    }
    return clean(about | provenance(reader, 0, compressor))


def _reader(vocabulary: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from ...compressors import Reader
    from ...shipped import pretrained

    tokenizer = AutoTokenizer.from_pretrained(pretrained("reader-small"))
    if vocabulary < len(tokenizer):
        raise ValueError(f"The shipped tokenizer has {len(tokenizer)} entries, the vocabulary is to have {vocabulary}.")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=32768,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return Reader(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer, name="memory")


def _rows(compressor: LLMLinguaCompressor, texts: list[str]) -> list[torch.Tensor]:
    """The batches that the compressor's scorer reads, as ids."""
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].clone())

    handle = compressor.scorer.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        compressor.compress(texts)
    finally:
        handle.remove()
    return seen


def main(
    tokens: Annotated[int, typer.Option(help="Of the text.")] = 16384,
    vocabulary: Annotated[int, typer.Option(help="Entries; the text uses the shipped tokenizer's.")] = 131072,
    repeats: Annotated[int, typer.Option(help="Pairs of runs.")] = 3,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Print the row as JSON."""
    typer.echo(json.dumps(measure_memory(tokens, vocabulary, repeats=repeats, threads=threads)))


if __name__ == "__main__":
    typer.run(main)
