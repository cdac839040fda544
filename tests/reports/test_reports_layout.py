"""Which module goes into which panel, and where."""

from safemerge_callback.reports.layout import panels


def test_panels_group_by_type_and_sort_by_layer():
    names = [f"layers.{i}.{t}" for i in (10, 2) for t in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    names += [f"layers.0.mlp.experts.{e}.w1" for e in (1, 0)] + ["embed_tokens", "lm_head"]
    found = {panel.title: panel for panel in panels(names)}
    assert list(found) == ["attn.c_proj", "mlp.c_proj", "c_fc", "w1", "outside the layers"]
    assert found["c_fc"].modules == ("layers.2.mlp.c_fc", "layers.10.mlp.c_fc")
    assert found["c_fc"].labels == ("2", "10")
    assert found["w1"].labels == ("0.0", "0.1")
    assert found["outside the layers"].labels == ("embed_tokens", "lm_head")
    assert sorted(name for panel in found.values() for name in panel.modules) == sorted(names)
