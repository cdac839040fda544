from safemerge_callback.adapters.names import layer_and_type
from safemerge_callback.training.trackers.columns import MOST_CELLS, MOST_COLUMNS, Drift, Row
from safemerge_callback.training.trackers.picture import heat_map


def rows(step, modules=4, merged=(), cosine=0.5):
    names = [f"layers.{n}.self_attn.q_proj" for n in range(modules)]
    return [
        Row(step, *layer_and_type(name), name, cosine, 0.3, None, 0.35, 1.0, 1.0, name in merged, "") for name in names
    ]


def test_a_name_is_taken_apart():
    assert layer_and_type("layers.3.self_attn.q_proj") == (3, "self_attn.q_proj")
    assert layer_and_type("visual.blocks.7.attn.qkv") == (7, "visual.blocks.attn.qkv")
    assert layer_and_type("layers.3.mlp.experts.12.up_proj") == (3, "mlp.experts.up_proj")
    assert layer_and_type("lm_head") == (None, "lm_head")


def test_few_checks_are_all_there():
    drift = Drift()
    for step in range(1, 6):
        drift.add(rows(step))
    assert [next(iter(c.values())).step for c in drift.columns] == [1, 2, 3, 4, 5]


def test_columns_stay_bounded_and_even_and_no_merge_is_lost():
    drift, name = Drift(), "layers.1.self_attn.q_proj"
    merged_at = {3, 64, 150, 199}
    for step in range(1, 201):
        drift.add(rows(step, merged={name} if step in merged_at else ()))
        assert len(drift.columns) <= MOST_COLUMNS
    last = [column[name].step for column in drift.columns]
    assert last == [*range(4, 201, 4)]
    shown = [column[name].step for column in drift.columns if column[name].merged]
    assert shown == [4, 64, 152, 200]
    assert not any(column["layers.0.self_attn.q_proj"].merged for column in drift.columns)


def test_many_modules_leave_fewer_columns():
    drift = Drift()
    for step in range(40):
        drift.add(rows(step, modules=600))
    assert len(drift.cells) <= MOST_CELLS


def test_pictures_are_due_at_powers_of_two():
    drift, due = Drift(), []
    for step in range(1, 40):
        drift.add(rows(step))
        due += [step] if drift.due else []
    assert due == [1, 2, 4, 8, 16, 32]


def test_the_picture_shows_the_cosine_by_colour_and_merges_by_a_dot():
    name = "layers.1.self_attn.q_proj"
    low, high = Drift(), Drift()
    for step in (1, 2):
        low.add(rows(step, merged={name} if step == 2 else (), cosine=0.0))
        high.add(rows(step, cosine=1.0))
    counts = [dict(map(reversed, heat_map(drift).getcolors(1 << 20))) for drift in (low, high)]
    darkest, brightest = (0x44, 0x01, 0x54), (0xFD, 0xE7, 0x25)
    assert counts[0][darkest] > 1000 > counts[0].get(brightest, 0)
    assert counts[1][brightest] > 1000 > counts[1].get(darkest, 0)
    # the 8 cells of one colour, less the dot of the one that was merged
    assert 0 < counts[1][brightest] - counts[0][darkest] < 200
    assert all((214, 39, 40) in found for found in counts)


def test_modules_without_a_number_or_a_layer_are_drawn_too():
    drift = Drift()
    odd = [
        Row(1, *layer_and_type(name), name, None, 0.3, None, None, 1.0, 1.0, False, "") for name in ("lm_head", "wte")
    ]
    drift.add([*rows(1), *odd])
    assert heat_map(drift).size[0] > 200
