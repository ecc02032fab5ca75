"""Token elimination: scores equal those from the model's own attention maps."""

from __future__ import annotations

import pytest
import torch
import zoo
from nutgraf.compressors import make_compressor
from nutgraf.compressors.fidelity.questions import ASKED

TEXT = "The treaty was signed in 1648 in Westphalia. Rivers carry sediment to the sea. It rained."
QUESTION = "Where was it signed?"


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma3_text", "gemma2"])
@torch.no_grad()
def test_scores_are_attention_times_value_norm(architecture):
    reader = zoo.reader(architecture, attn_implementation="eager")
    compressor = make_compressor("token-elimination", reader, rows=3)
    other = "A nut graf is the paragraph that tells the story."
    found, _ = compressor.score([TEXT, other], [QUESTION, QUESTION])  # padded on the right
    ids = reader.tokenize(TEXT)
    row = torch.tensor([[*reader.bos_ids, *ids, *reader.tokenize(ASKED.format(question=QUESTION))]])
    layer = reader.model.get_decoder().layers[1]  # the middle third of three layers
    seen: dict[str, torch.Tensor] = {}
    fused = architecture == "gpt_neox"
    module = layer.attention.query_key_value if fused else layer.self_attn.v_proj
    hook = module.register_forward_hook(lambda _, __, out: seen.update(out=out))
    maps = reader.model(input_ids=row, output_attentions=True).attentions[1][0]  # [heads, time, time]
    hook.remove()
    heads, size = maps.shape[0], 8
    if fused:
        values = seen["out"][0].view(row.shape[1], heads, 3, size)[:, :, 2]
    else:
        values = seen["out"][0].view(row.shape[1], -1, size)
    norms = values.norm(dim=-1).T  # [kv heads, time]
    norms = norms.repeat_interleave(heads // norms.shape[0], 0)
    want = (maps[:, -3:] * norms[:, None]).mean((0, 1))
    start = len(reader.bos_ids)
    assert torch.allclose(found.nll, want[start : start + len(ids)], atol=1e-4)
    assert found.ids == ids


def test_long_texts_are_read_in_windows_and_budgets_hold():
    reader = zoo.reader("llama")
    compressor = make_compressor("token-elimination", reader, window=80)
    long = TEXT * 6
    (found,) = compressor.score([long], [QUESTION])
    assert len(found.nll) == len(reader.tokenize(long)) > 80
    assert bool((found.nll > 0).all())
    (short,) = compressor.compress([long], QUESTION, ratio=4)
    assert 0 < short.n_tokens <= short.source_tokens / 4
    with pytest.raises(ValueError, match="leave no room"):
        compressor.score([TEXT], ["Why? " * 60])
