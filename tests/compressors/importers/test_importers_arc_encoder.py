"""ARC-Encoder checkpoints, in both layouts, against a computation in plain torch."""

from __future__ import annotations

import json

import legacy
import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors import CheckpointError
from nutgraf.compressors.importers import MissingOption, import_checkpoint, import_to, recognise
from oracles import arc_encoder as oracle
from safetensors.torch import save_file

TEXTS = [
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
    "Hi",
    "Rivers carry sediment to the sea. " * 30,
]
SIZE, THETA, EPS = 8, 1000.0, 1e-4
OPTIONS = {"head_dim": SIZE, "rope_theta": THETA, "norm_eps": EPS}
SHAPES = {
    "attention.wq": (24, 24),
    "attention.wk": (8, 24),
    "attention.wv": (8, 24),
    "attention.wo": (24, 24),
    "feed_forward.w1": (28, 24),
    "feed_forward.w2": (24, 28),
    "feed_forward.w3": (28, 24),
    "attention_norm": (24,),
    "ffn_norm": (24,),
}


class Checkpoint:
    """An encoder of width 24 with three heads and one of keys, for ``decoders`` readers of width 32."""

    def __init__(self, rows, decoders=2, rate=8):
        torch.manual_seed(0)
        self.rate, self.decoders = rate, decoders
        self.layers = [{name: 0.3 * torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(3)]
        for layer in self.layers:
            layer |= {name: layer[name] + 1 for name in ("attention_norm", "ffn_norm")}
        self.table = torch.randn(rows, 24)
        self.bridges = [(0.3 * torch.randn(12, 24), 0.3 * torch.randn(32, 12)) for _ in range(decoders)]
        self.vectors = torch.randn(decoders, 24)

    def state(self):
        state = {"embedder.tok_embeddings.weight": self.table}
        for i, layer in enumerate(self.layers):
            state |= {f"embedder.layers.{i}.{name}.weight": t for name, t in layer.items()}
        for i, ((first, second), vector) in enumerate(zip(self.bridges, self.vectors)):
            place = f"bridge_module.{i}" if self.decoders > 1 else "bridge_module"
            state |= {f"{place}.layer1.weight": first, f"{place}.layer2.weight": second}
            state |= {f"embedder.cont_tok.{i}.weight": vector[None], f"embedder.rec_tok.{i}.weight": -vector[None]}
        return {name: t.clone() for name, t in state.items()}

    def on_the_hub(self, folder, **changes):
        folder.mkdir()
        state = {name: t for name, t in (self.state() | changes).items() if t is not None}
        save_file(state, folder / "model.safetensors")
        return folder

    def as_trained(self, folder, **changes):
        for part in ("embedder", "bridge_module"):
            (folder / part).mkdir(parents=True)
            state = {n.removeprefix(f"{part}."): t for n, t in self.state().items() if n.startswith(f"{part}.")}
            save_file(state, folder / part / "consolidated.safetensors")
        encoder = {
            "n_truncated_layers": 2,
            "pooling_module": {"pool_type": "mean_pooled_queries", "where": "before"},
            "memory_tokens": 0,
            "rec_tok": True,
            "cont_tok": True,
            "compress_rates": [-self.rate],
            "trained_layers": 3,
            "train_embedding_mtx": True,
            "causal_embedder": False,
        }
        settings = {"param_dtype": "float32", "embedder_params": encoder | changes, "bridge_module": {}}
        (folder / "params.json").write_text(json.dumps(settings))
        return folder

    def slots(self, ids, decoder=0):
        found = oracle.states(self.table, self.layers, ids, self.rate, size=SIZE, theta=THETA, eps=EPS)
        found = torch.cat([found, self.vectors[decoder][None].double()])
        first, second = self.bridges[decoder]
        return (found @ first.double().T @ second.double().T).float()


@pytest.fixture(scope="module")
def checkpoint(zoo):
    return Checkpoint(len(zoo.tokenizer()))


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader("qwen3")


@pytest.mark.parametrize("decoder", [0, 1])
def test_it_computes_what_the_equations_give(zoo, tmp_path, checkpoint, reader, decoder):
    folder = checkpoint.on_the_hub(tmp_path / "arc")
    assert recognise(folder) == "arc-encoder"
    arc = import_checkpoint("arc-encoder", folder, reader, compress_rate=8, decoder=decoder, **OPTIONS)
    assert arc.reader is reader
    found = arc.compress([*TEXTS, ""])
    for text, passage in zip(TEXTS, found):
        ids = zoo.tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert torch.allclose(passage.embeds, checkpoint.slots(ids, decoder), atol=1e-4)
        assert passage.slots == -(-len(ids) // 8) + 1
    assert found[-1].slots == 0


def test_the_layout_of_training_and_what_an_import_writes(zoo, tmp_path, checkpoint, reader):
    folder = checkpoint.as_trained(tmp_path / "arc")
    assert recognise(folder) == "arc-encoder"
    ignored = import_to("arc-encoder", folder, tmp_path / "out", reader, **OPTIONS)
    assert set(ignored.values()) == {"vectors that ask for a repetition", "other decoders' parts"}
    loaded = load_compressor(tmp_path / "out", reader)
    for text, passage in zip(TEXTS, loaded.compress(TEXTS)):
        ids = zoo.tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert torch.allclose(passage.embeds, checkpoint.slots(ids), atol=1e-4)
    # Nothing is saved that the checkpoint did not hold.
    assert not [name for name, _ in loaded.named_parameters() if name.endswith("body.norm.weight")]
    assert loaded.fingerprint == import_checkpoint("arc-encoder", folder, reader, **OPTIONS).fingerprint


@pytest.mark.parametrize("kind", legacy.RELEASED)
def test_text_is_spelled_as_by_the_encoders_own_tokenizer(tmp_path, reader, kind):
    held = Checkpoint(len(legacy.tokenizer(kind)))
    folder = held.on_the_hub(tmp_path / "arc")
    legacy.tokenizer(kind).save_pretrained(folder)
    arc = import_checkpoint("arc-encoder", folder, reader, compress_rate=8, **OPTIONS)
    for text, passage in zip(TEXTS, arc.compress(TEXTS)):
        assert torch.allclose(passage.embeds, held.slots(legacy.spelled(kind, text)), atol=1e-4)


def test_one_decoder_and_no_vectors(zoo, tmp_path, reader):
    single = Checkpoint(len(zoo.tokenizer()), decoders=1)
    vectors = {f"embedder.{kind}_tok.0.weight": None for kind in ("rec", "cont")}
    folder = single.on_the_hub(tmp_path / "arc", **vectors)
    arc = import_checkpoint("arc-encoder", folder, reader, compress_rate=8, **OPTIONS)
    ids = zoo.tokenizer()(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert torch.allclose(arc.compress(TEXTS[:1])[0].embeds, single.slots(ids)[:-1], atol=1e-4)


DAMAGE = {
    "a layer": ({"embedder.layers.1.feed_forward.w2.weight": None}, {}, r"lacks embedder\.layers\.1\.feed_forward\.w2"),
    "a shape": (
        {"embedder.layers.1.feed_forward.w2.weight": torch.zeros(24, 7)},
        {},
        r"down_proj\.weight is \(24, 7\), wanted \(24, 28\)",
    ),
    "an unknown key": ({"embedder.mem_embeddings.weight": torch.zeros(2, 24)}, {}, "mem_embeddings"),
    "no bridge": ({"bridge_module.0.layer2.weight": None}, {}, r"lacks bridge_module\.0\.layer2"),
    "another reader": ({"bridge_module.0.layer2.weight": torch.zeros(31, 12)}, {}, r"\(31, 12\), wanted \(32, 12\)"),
    "no such decoder": ({}, {"decoder": 2}, "no decoder 2; it holds 0, 1"),
    "head size": ({}, {"head_dim": 16}, "wanted rows for heads of 16"),
    "not finite": ({"embedder.cont_tok.0.weight": torch.full((1, 24), torch.nan)}, {}, "NaN"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damage_is_refused_by_name(tmp_path, checkpoint, reader, damage):
    changes, options, named = DAMAGE[damage]
    folder = checkpoint.on_the_hub(tmp_path / "arc", **changes)
    with pytest.raises(CheckpointError, match=named):
        import_to("arc-encoder", folder, tmp_path / "out", reader, compress_rate=8, **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"causal_embedder": True}, "causal_embedder to True"),
        ({"memory_tokens": 4}, "memory_tokens to 4"),
        ({"pooling_module": {"pool_type": "kmeans", "where": "between"}}, "kmeans"),
        ({"compress_rates": [-2, -4]}, "compress_rates"),
        ({"compress_rates": [8]}, "compress_rates"),
        ({"later_setting": 1}, "later_setting, which is not known"),
    ],
)
def test_an_encoder_of_another_kind_is_refused(tmp_path, checkpoint, reader, changes, named):
    folder = checkpoint.as_trained(tmp_path / "arc", **changes)
    with pytest.raises(CheckpointError, match=named):
        import_checkpoint("arc-encoder", folder, reader, **OPTIONS)


def test_it_asks_for_what_it_lacks(zoo, tmp_path, checkpoint, reader):
    folder = checkpoint.on_the_hub(tmp_path / "arc")
    with pytest.raises(MissingOption, match="compress_rate"):
        import_checkpoint("arc-encoder", folder, reader, **OPTIONS)
    with pytest.raises(MissingOption, match="holds no decoder"):
        import_checkpoint("arc-encoder", folder, compress_rate=8, **OPTIONS)
    larger = Checkpoint(len(zoo.tokenizer()) + 5).on_the_hub(tmp_path / "larger")
    with pytest.raises(MissingOption, match="tokenizer"):
        import_checkpoint("arc-encoder", larger, reader, compress_rate=8, **OPTIONS)
    zoo.tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = {"tokenizer": str(tmp_path / "tokenizer"), "compress_rate": 8}
    assert import_checkpoint("arc-encoder", larger, reader, **given, **OPTIONS).compress(TEXTS)
