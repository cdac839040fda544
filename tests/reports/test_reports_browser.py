"""The page in a real headless Chromium: what it draws, what it lets one do, and what it does not do."""

import io
import json
import re

import pytest

from recipes.example_run import write_example
from safemerge_callback.reports import read_history, write_page

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">"\'&{{ 7 * 7 }}'


@pytest.fixture(scope="module")
def page_file(example, tmp_path_factory):
    return write_page(read_history(example), tmp_path_factory.mktemp("page") / "drift.html")


@pytest.fixture
def look(browser):
    """Open a file as a person would; what the page says to the console and asks for is kept, and checked at the end."""
    contexts, said, asked = [], [], []

    def opened(path, width=1280, height=900, **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        # Everything is drawn in one frame, the charts last.
        page.wait_for_selector(".chart svg")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert asked
    assert {url.partition(":")[0] for url in asked} == {"file"}
    assert len(set(asked)) == 1


def colours(picture):
    from PIL import Image

    return len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors(maxcolors=1 << 24))


def canvas_colours(page, index):
    """How many colours the canvas of a panel holds."""
    return page.evaluate(
        """(index) => {
            const canvas = document.querySelectorAll("#heat canvas")[index];
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const found = new Set();
            for (let at = 0; at < data.length; at += 4) found.add(data.slice(at, at + 4).join());
            return found.size;
        }""",
        index,
    )


def names(page):
    """The modules that the table shows, in its order."""
    return page.eval_on_selector_all(
        "#table tbody tr", "rows => rows.filter(r => !r.hidden).map(r => r.cells[1].textContent)"
    )


def test_everything_is_drawn(look, page_file, example):
    page = look(page_file)
    history = read_history(example)
    assert page.locator("#heat canvas").count() == 7
    assert all(canvas_colours(page, index) > 20 for index in range(7))
    assert colours(page.screenshot(full_page=True)) > 500
    for chart in ("moved-chart", "curve-chart", "weight-chart", "probe-chart", "own-charts"):
        drawn = page.locator(f"#{chart} path.line").evaluate_all("lines => lines.map(l => l.getTotalLength())")
        assert drawn, chart
        assert min(drawn) > 50, chart
    assert page.locator("#curve-chart path.null").count() == 3
    assert page.locator("#curve-chart .gate-label").text_content() == "threshold 0.35"
    assert len(names(page)) == len(history.modules) == 28
    # No name is broken where there is room for it.
    assert max(page.locator("#table tbody tr").evaluate_all("rows => rows.map(r => r.offsetHeight)")) < 45
    assert "harm, higher is safer" in page.locator("#probe-chart").inner_text()


# Charts with a point above or below the axes, where the words are, or with a word cut off at the left.
OUTSIDE = """charts => charts.filter(svg => {
    const { width, height } = svg.viewBox.baseVal;
    const floor = Math.max(...[...svg.querySelectorAll("line.axis")].map(line => line.y1.baseVal.value));
    const off = (x, y) => x < 0 || x > width || y < 0 || y > floor + 1;
    const points = [...svg.querySelectorAll("circle.ring")].map(ring => [ring.cx.baseVal.value, ring.cy.baseVal.value]);
    const lines = [...svg.querySelectorAll("path.line")].map(line => line.getBBox());
    for (const box of lines) points.push([box.x, box.y], [box.x + box.width, box.y + box.height]);
    const words = [...svg.querySelectorAll("text")].map(text => text.getBBox());
    return points.some(([x, y]) => off(x, y)) || words.some(box => box.x < 0 || box.x + box.width > width + 1);
}).map(svg => svg.getAttribute("aria-label"))"""


@pytest.mark.parametrize("width", [1280, 390])
def test_every_measure_lies_within_its_axis_and_is_in_its_unit(look, scales, tmp_path, width):
    page = look(write_page(read_history(scales), tmp_path / "page.html"), width=width)
    assert page.locator(".chart > svg").evaluate_all(OUTSIDE) == []
    charts = page.locator("#own-charts .chart")
    legends = [charts.nth(n).locator(".legend").inner_text() for n in range(charts.count())]
    assert legends == [
        "eval loss (task), nats a token",
        "translation (task), BLEU",
        "reward (task)",
        "same again (task)",
        "called a share (task)",
        "tokens seen (task), tokens",
        "error rate (task)",
    ]
    # marks that differ are told apart in words
    for n in range(charts.count()):
        words = charts.nth(n).locator("svg text[text-anchor=end]").all_text_contents()[:-1]
        assert len(set(words)) == len(words) >= 2, words
    charts.nth(1).locator("svg[role=img]").focus()
    page.keyboard.press("Home")
    assert charts.nth(1).locator(".readout").inner_text() == "step 0, begin: translation 36.5 BLEU, n = 200"
    assert "%" not in page.locator("#own-charts").inner_text()
    assert page.locator("#probe-chart path.line").count() == 3


def test_what_moved_along_the_alignment_is_first(look, page_file, example):
    page = look(page_file)
    moved = read_history(example).moved
    assert page.locator("main section").first.get_attribute("id") == "moved"
    chart = page.locator("#moved-chart svg")
    chart.focus()
    page.keyboard.press("Home")
    told = page.locator("#moved-chart .readout")
    assert told.inner_text().startswith(f"step {min(moved)}: moved {moved[min(moved)]:.2f}, not below -0.55")
    assert page.locator("#moved-chart .gate-label").text_content() == "edge -0.55"


def test_every_cell_tells_its_reading(look, page_file, example):
    """By the keyboard alone: into a panel, to its corners, and Enter draws the module."""
    page = look(page_file)
    history = read_history(example)
    canvas = page.locator("#heat canvas").nth(0)
    canvas.focus()
    page.keyboard.press("Home")
    first, last = history.steps[0], history.steps[-1]
    name = "layers.0.self_attn.q_proj"
    told = page.locator("#heat-readout")
    assert f"{name}, step {first}: cosine {history.cells[name, first].cosine:.4f}" in told.text_content()
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    name = "layers.1.self_attn.q_proj"
    cell = history.cells[name, last]
    assert f"step {last}: cosine {cell.cosine:.4f}; null {cell.null_cosine:.4f}" in told.text_content()
    assert f"gate: {cell.reason}" in told.text_content()
    shown = page.locator("#chosen li").count()
    page.keyboard.press("Enter")
    assert page.locator("#chosen li").count() == shown + 1
    assert name in page.locator("#chosen").inner_text()
    assert page.locator("#table tbody tr", has_text=name).locator("input").is_checked()


def test_all_reasons_are_those_of_the_journal(look, page_file, example):
    """The page keeps words once and numbers apart; put together they are what the journal holds."""
    page = look(page_file)
    history = read_history(example)
    page.locator("#heat canvas").nth(6).focus()
    page.keyboard.press("Home")
    for step in history.steps:
        cell = history.cells["layers.0.mlp.down_proj", step]
        assert page.locator("#heat-readout").text_content().endswith(f"gate: {cell.reason}")
        page.keyboard.press("ArrowRight")


def test_the_table_sorts_by_keyboard(look, page_file, example):
    page = look(page_file)
    history = read_history(example)
    last = {name: round(cells[history.steps[-1]].cosine, 4) for name, cells in history.by_module.items()}
    page.locator("#table th[data-key=last] button").focus()
    page.keyboard.press("Enter")
    assert [last[name] for name in names(page)] == sorted(last.values())
    assert page.locator("#table th[data-key=last]").get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert [last[name] for name in names(page)] == sorted(last.values(), reverse=True)
    assert page.locator("#table th[aria-sort]").count() == 1
    page.locator("#table th[data-key=name] button").press("Enter")
    assert names(page)[:2] == ["layers.0.mlp.down_proj", "layers.0.mlp.gate_proj"]


def test_the_table_filters_by_keyboard(look, page_file, example):
    page = look(page_file)
    history = read_history(example)
    page.locator("#find").focus()
    page.keyboard.type("q_proj layers.2")
    assert names(page) == ["layers.2.self_attn.q_proj"]
    assert page.locator("#count").text_content() == "1 of 28 modules"
    page.locator("#find").fill("")
    page.locator("#which").select_option("merged")
    assert set(names(page)) == history.merged_modules
    page.locator("#which").select_option("below")
    below = {name for name, cells in history.by_module.items() if cells[history.steps[-1]].margin < 0}
    assert set(names(page)) == below
    page.locator("#which").select_option("odd")
    assert names(page) == []


def test_tab_reaches_every_control_and_focus_is_seen(look, page_file):
    page = look(page_file)
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        what = page.evaluate(
            """() => {
                const now = document.activeElement, style = getComputedStyle(now), near = now.closest("[id]");
                return [now.tagName, now.id, near && near.id, style.outlineStyle, parseFloat(style.outlineWidth)];
            }"""
        )
        if what[0] == "BODY":
            break
        assert what[3] != "none", what
        assert what[4] >= 1, what
        reached.append(what)
    tags = [tag for tag, *_ in reached]
    assert reached[0][0] == "A"
    assert tags.count("CANVAS") == 7
    assert {"find", "which"} <= {own for _, own, *_ in reached}
    assert {"curve-chart", "probe-chart", "weight-chart"} <= {near for _, _, near, *_ in reached}
    assert [near for tag, _, near, *_ in reached if tag == "BUTTON"].count("table") == 11


def test_dark_and_light_differ_and_words_stand_out_in_both(look, page_file):
    grounds = {}
    for scheme in ("light", "dark"):
        page = look(page_file, color_scheme=scheme)
        worst, where = page.evaluate(CONTRAST)
        assert worst >= 4.5, (scheme, where)
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colours(page.screenshot()) > 200
    light, dark = (sum(json.loads(f"[{ground[4:-1]}]")) for ground in grounds.values())
    assert light > 600
    assert dark < 150


# Text against the nearest ground behind it: WCAG 2's ratio of relative luminances; 4.5 is level AA.
CONTRAST = """() => {
    const parts = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (c) => {
        const [r, g, b] = c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const c = parts(getComputedStyle(at).backgroundColor);
            if (c.length === 3 || c[3] > 0.99) return c.slice(0, 3);
        }
        return [255, 255, 255];
    };
    let worst = [99, ""];
    for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        if (!own || !node.getClientRects().length) continue;
        if (["SCRIPT", "STYLE", "NOSCRIPT", "OPTION"].includes(node.tagName)) continue;
        const style = getComputedStyle(node);
        const ink = parts(node instanceof SVGElement ? style.fill : style.color).slice(0, 3);
        const [a, b] = [light(ink), light(ground(node))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < worst[0]) worst = [ratio, `${node.tagName} ${node.textContent.slice(0, 40)}`];
    }
    return worst;
}"""


def test_a_phone_shows_it_without_scrolling_sideways(look, page_file):
    page = look(page_file, width=390, height=844, is_mobile=True, has_touch=True, device_scale_factor=2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("window.innerWidth") == 390
    widths = page.locator("main > *, figure, canvas, .chart").evaluate_all("all => all.map(one => one.offsetWidth)")
    assert max(widths) <= 390
    assert colours(page.screenshot()) > 100
    page.locator("#heat canvas").nth(1).tap(position={"x": 200, "y": 20})
    assert "k_proj, step" in page.locator("#heat-readout").text_content()


def test_no_name_becomes_markup(look, tmp_path):
    """A module, a run, a reason, a measure and a fault that are markup are shown as the text that they are."""
    folder = tmp_path / "<b>run<b>"
    journal = write_example(folder, layers=2, checks=4)
    lines = journal.read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        for module in entry.get("modules", []):
            if module["name"].startswith("layers.0.mlp"):
                module["name"] = f"layers.0.{EVIL}"
                module["reason"] = EVIL
        for measure in entry.get("measures", []):
            measure["measure"] = EVIL if measure["kind"] == "harm" else measure["measure"]
    entries[0]["config"][EVIL] = EVIL
    entries.insert(-1, {"kind": "error", "step": 1, "where": EVIL, "error": "</script>"})
    entries.insert(-1, {"kind": "rollback", "step": 1, "modules": [f"layers.0.{EVIL}"], "reason": EVIL})
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = look(write_page(read_history(journal), tmp_path / "evil.html"))
    assert page.locator("h1").text_content() == "<b>run<b>"
    assert f"layers.0.{EVIL}" in names(page)
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("img").count() == 0
    assert page.locator("main b").count() == 0
    page.locator("#table tbody tr", has_text="alert(1)").locator("input").check()
    assert EVIL in page.locator("#chosen").text_content()
    assert "49" not in page.locator("h1, #chosen").first.text_content()


def test_what_the_policy_forbids_does_not_run(browser, page_file, tmp_path):
    """The policy is what stands behind the escaping: a script and a picture that got in do nothing."""
    text = page_file.read_text()
    broken = text.replace("</main>", '<img src="http://127.0.0.1:9/x.png"><script>window.ran = 1</script></main>')
    assert broken != text
    (tmp_path / "broken.html").write_text(broken)
    page = browser.new_page()
    asked = []
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.goto((tmp_path / "broken.html").as_uri())
    page.wait_for_selector("#curve-chart svg")
    assert page.evaluate("window.ran") is None
    assert all(url.startswith("file:") for url in asked)
    page.close()


@pytest.mark.parametrize("gate", ["watch", "calibrated", "num_layers"])
def test_other_gates_and_runs_without_merges(look, tmp_path, gate):
    from safemerge_callback.decision import Gate

    knobs = {"calibrated": {"z_threshold": 7.0}, "num_layers": {"num_layers": 3}}.get(gate, {})
    journal = write_example(tmp_path / "run", layers=2, checks=1 if gate == "watch" else 6, gate=Gate(gate, **knobs))
    page = look(write_page(read_history(journal), tmp_path / "page.html"))
    assert page.locator("#weight-chart").count() == (gate != "watch")
    assert page.locator("#curve-chart .gate-label").count() == 0
    drawn = page.locator("#curve-chart path.line").evaluate_all("lines => lines.map(l => l.getTotalLength())")
    assert len(drawn) == 3
    assert min(drawn) >= 20
    assert (page.locator("#curve-chart path.gate").count() > 0) == (gate == "calibrated")


def test_odd_modules_are_told(look, tmp_path):
    journal = write_example(tmp_path / "run", layers=2, checks=3)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    checks = [entry for entry in entries if entry["kind"] == "check"]
    checks[-1]["modules"][0]["cosine"] = None
    checks[-1]["modules"][1]["update_norm"] = 0.0
    del checks[1]["modules"][2]
    checks[-1]["modules"].append({**checks[-1]["modules"][3], "name": "lm_head"})
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = look(write_page(read_history(journal), tmp_path / "page.html"))
    page.locator("#which").select_option("odd")
    odd = [checks[-1]["modules"][0]["name"], checks[-1]["modules"][1]["name"]]
    assert sorted(names(page)) == sorted(odd)
    shown = page.locator("#table tbody").inner_text()
    assert "not finite" in shown
    assert "not moved" in shown
    assert "nothing to measure" in page.locator("#scale").inner_text()
    page.locator("#heat canvas").last.focus()
    page.keyboard.press("Home")
    assert "lm_head, step 10: not measured" in page.locator("#heat-readout").text_content()


def test_a_run_with_a_probe_alone_has_its_curves(look, tmp_path, example):
    probes = [line for line in example.read_text().splitlines() if '"kind": "probe"' in line]
    (tmp_path / "safemerge.jsonl").write_text("\n".join(probes) + "\n")
    page = look(write_page(read_history(tmp_path), tmp_path / "page.html"))
    assert page.locator("#probe-chart path.line").count() == 3
    assert page.locator("#own-charts path.line").count() == 1
    assert page.locator("#heat, #modules, #curves").count() == 0
    assert "harm" in page.locator("#probe").inner_text()


def test_a_change_of_another_correction_has_its_name(look, tmp_path):
    journal = write_example(tmp_path / "run", layers=2, checks=3)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    last = next(entry for entry in reversed(entries) if entry["kind"] == "merge")
    change = {"kind": "change", "step": last["step"], "correction": "average", "seconds": 0.1}
    change["modules"] = [{**module, "task_weight": 0.5} for module in last["modules"]]
    entries.insert(entries.index(last), change)
    entries.insert(1, {**change, "step": 5})
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = look(write_page(read_history(journal), tmp_path / "page.html"))
    chart = page.locator("#moved-chart")
    chart.locator("svg[role=img]").focus()
    page.keyboard.press("Home")
    assert chart.locator(".readout").inner_text().endswith("modules were changed by average at this check")
    page.keyboard.press("End")
    assert chart.locator(".readout").inner_text().endswith("modules were changed by average and merged at this check")
    assert "merged, or changed by average" in page.locator("#scale").inner_text()
    page.locator("#table th[data-key=change-average] button").click()
    column = page.locator("#table th").evaluate_all("heads => heads.findIndex(h => h.dataset.key === 'change-average')")
    counts = page.locator("#table tbody tr").evaluate_all(f"rows => rows.map(r => r.cells[{column}].textContent)")
    assert counts == sorted(counts)
    assert counts.count("2") == len(last["modules"])


def test_the_losses_of_a_run_without_checks_are_drawn_and_read_by_the_keyboard(look, replayed, runs, tmp_path):
    entries = runs.entries(replayed, "gradient")
    for scheme in ("light", "dark"):
        page = look(write_page(read_history(replayed), tmp_path / "page.html"), color_scheme=scheme)
        assert page.locator("main section").first.get_attribute("id") == "losses"
        charts = page.locator("#term-charts .chart")
        assert charts.count() == 3
        assert charts.nth(0).locator("path.line").count() == 3
        legend = charts.nth(0).locator(".legend span").all_inner_texts()
        assert legend == ["replay, mean loss", "benign rows", "harm rows"]
        assert page.locator(".chart > svg").evaluate_all(OUTSIDE) == []
        assert colours(page.screenshot(full_page=True)) > 100
        picture = charts.nth(0).locator("svg[role=img]")
        assert picture.get_attribute("aria-label").startswith("replay: mean loss over steps; arrow keys move from")
        picture.focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        said = charts.nth(0).locator("[role=status]").inner_text()
        assert said.startswith("step 2 (1 step, 2 rows): replay, mean loss ")
        loss = float(re.search(r"mean loss ([-\d.e]+)", said)[1])
        assert loss == pytest.approx(entries[1]["loss"], rel=5e-3)
    page.locator("#losses summary").press("Enter")
    assert page.locator("#losses tbody tr").count() == 12


def test_a_run_of_changes_alone_draws_what_they_left(look, changed, tmp_path):
    page = look(write_page(read_history(changed), tmp_path / "page.html"))
    assert page.locator(".chart").evaluate_all("boxes => boxes.map((box) => box.id)") == ["weight-chart"]
    assert page.locator("#weight-chart path.line").count() == 2
    page.locator("#table input").first.uncheck()
    assert page.locator("#weight-chart path.line").count() == 1
    assert page.locator("#chosen li").count() == 1


def test_losses_stand_beside_merges_and_probes(look, both, tmp_path):
    page = look(write_page(read_history(both), tmp_path / "page.html"), width=390)
    assert page.locator("main section").evaluate_all("all => all.map(one => one.id)")[:3] == [
        "moved",
        "losses",
        "drift",
    ]
    merged = sorted({step for _, step in read_history(both).merges})
    losses = page.locator("#term-charts .chart").nth(0)
    assert losses.locator("line.change").count() == len(merged)
    assert "modules merged" in losses.locator(".legend").inner_text()
    assert page.locator(".chart > svg").evaluate_all(OUTSIDE) == []
    losses.locator("svg[role=img]").focus()
    page.keyboard.press("End")
    for _ in range((120 - merged[-1]) // 5):
        page.keyboard.press("ArrowLeft")
    said = losses.locator("[role=status]").inner_text()
    assert said.startswith(f"step {merged[-1]} (5 steps, 10 rows): replay, mean loss ")
    assert said.endswith(f"modules were merged at step {merged[-1]}")
