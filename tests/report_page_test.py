"""The page of runs: what it says of run folders that are written here, and what a browser makes of it."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from configs import llamagen, mirai_e
from mirai_jax import report
from mirai_jax.config.compare import to_json
from mirai_jax.reporting import grids, measures, page
from mirai_jax.training.metrics_writer import MetricsWriter
from mirai_jax.utils import files, paths, pictures
from tests.helpers import ROOT, exit_message, refusal

pytest.importorskip("plotly")


def write_run(folder, config, entries=(), events=(), samples=()):
    """A workdir; `entries` are {step: values}."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    writer = MetricsWriter(folder, 0)
    for step, values in dict(entries).items():
        writer.step(step, values)
    writer.close()
    write_lines(folder / "events.jsonl", [{"time": "2026-11-28T10:00:00", **e} for e in events])
    for step in samples:
        image = np.full((40, 60, 3), step % 256, np.uint8)
        pictures.save_picture(folder / "samples" / f"step_{step:07d}.png", image)
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def data_of(*folders):
    """What the page of these runs draws."""
    html, count = page.make([str(folder) for folder in folders])
    assert count == len(folders)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def panel(data, name, x="step"):
    title = measures.describe(name).title + (" against guidance" if x == "guidance" else "")
    (found,) = [p for p in data["panels"] if (p["title"], p["x"]) == (title, x)]
    return found


def cell(data, row, column):
    summary = data["summary"]
    return summary["rows"][row][summary["head"].index(column)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Mirai-E and LlamaGen at imagenet_b with validation and FID in the run, of one folder name."""
    top = tmp_path_factory.mktemp("runs")
    for i, module in enumerate((mirai_e, llamagen)):
        entries = {}
        for step in range(100, 4001, 100):
            entries[step] = {"loss": 9 - i, "cross_entropy": 9 + i - step / 1000, "grad_norm": 1.0}
            entries[step] |= {"images_per_second": 256.0, "wait_share": 0.25}
            entries[step] |= {"foresight_ema_r0c1": 0.0 if step < 2000 else -0.5} if not i else {}
            if step % 1000 == 0:
                entries[step]["validation_ce"] = 8.5 + i
                entries[step] |= {f"fid_guidance_{g:g}": 20 + g - step / 1000 for g in (1.5, 2, 3)}
                entries[step]["never_heard_of"] = 7.0
        events = ({"event": "started"}, {"event": "preempted"}, {"event": "resumed", "step": 1000})
        events += 7 * ({"event": "image_replaced", "image": "n01/a.JPEG"},)
        config = module.get_config("imagenet_b")
        write_run(top / "ab"[i] / "run", config, entries, events, (1000, 2000, 3000))
    return [top / "a" / "run", top / "b" / "run"]


def test_the_curves_of_all_runs_stand_in_one_panel_each(imagenet):
    data = data_of(*imagenet)
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]
    found = panel(data, "cross_entropy")
    assert (found["unit"], found["better"], found["section"]) == (
        "nats a token",
        "less",
        "Training",
    )
    assert [curve["run"] for curve in found["curves"]] == [0, 1]
    steps = list(range(100, 4001, 100))
    for i, curve in enumerate(found["curves"]):
        assert curve["x"] == steps
        np.testing.assert_allclose(curve["y"], [9 + i - step / 1000 for step in steps], rtol=1e-5)
        assert min(curve["y"]) <= curve["smooth"][-1] < curve["y"][-3]
    (term,) = panel(data, "foresight_ema_r0c1")["curves"]  # from where it has begun
    assert term["x"][0] == 2000 and set(term["y"]) == {-0.5}
    assert panel(data, "never_heard_of")["section"] == "Other"
    assert panel(data, "validation_ce")["curves"][1]["y"] == [9.5] * 4
    assert "smooth" not in panel(data, "validation_ce")["curves"][1]


def test_fid_by_step_by_guidance_and_beside_the_paper(imagenet):
    data = data_of(*imagenet)
    found = panel(data, "fid")
    assert [(c["run"], c["label"]) for c in found["curves"][:3]] == [
        (0, "guidance 1.5"), (0, "guidance 2"), (0, "guidance 3"),
    ]  # fmt: skip
    assert found["curves"][1]["x"] == [1000, 2000, 3000, 4000]
    assert found["curves"][1]["y"] == [21, 20, 19, 18]
    sweep = panel(data, "fid", "guidance")["curves"][1]
    assert sweep == {"run": 1, "label": "step 4,000", "x": [1.5, 2, 3], "y": [17.5, 18, 19]}
    paper = {curve["title"]: curve for curve in found["published"]}
    assert paper["LlamaGen, B"]["x"][:4] == [100_080, 200_160, 300_240, 400_320]
    assert paper["LlamaGen, B"]["y"][3:] == [6.36, 5.34]
    assert paper["Mirai-I, B"]["y"][3] == 4.77 and len(paper) == 3
    assert cell(data, 0, "FID") == "17.5 (step 4,000, guidance 1.5)"
    assert measures.published_fid("imagenet_xl", 512)["Mirai-E, XL"][0][0] == 20 * 2502
    for scale in ("imagenet_b_384", "imagenet_xxl", "demo"):
        assert measures.published_fid(scale, 256) == {}


def test_hours_are_those_of_the_steps(imagenet):
    """256 images a second at a batch of 256: a step a second, those before the first speed as well."""
    data = data_of(*imagenet)
    steps, hours = data["runs"][0]["clock"]
    np.testing.assert_allclose(hours, np.array(steps) / 3600, rtol=1e-5)
    assert cell(data, 0, "hours of training") == "1.11"
    assert cell(data, 0, "wait for data") == "25.0%"


def test_config_differences_and_events(imagenet):
    data = data_of(*imagenet)
    fields = {row[0]: row[1:] for row in data["config"]["rows"]}
    assert fields["name"] == ['"mirai_e"', '"llamagen"']
    assert fields["foresight[0].source"] == ['"ema"', "–"]
    assert not {"seed", "batch_size", "model.size"} & fields.keys()
    alone = {row[0]: row[1] for row in data_of(imagenet[0])["config"]["rows"]}
    assert alone["seed"] == "0" and alone["model.size"] == '"B"' and "mesh.data" not in alone
    run = data["runs"][0]
    assert run["counts"] == "restarts: 1, images replaced: 7"
    assert [row[1] for row in run["events"]] == ["started", "preempted", "resumed"] + 4 * [
        "image_replaced"
    ]
    assert run["events"][-1][2] == "and 4 more"


def test_assessments_and_evaluations(tmp_path):
    folder = write_run(tmp_path / "run", llamagen.get_config("fashion_mnist"))
    for guidance in (1.0, 2.0):
        protocol = {"samples": 2000, "guidance": guidance}
        line = {"protocol": protocol, "cross_entropy": 1.25, "frechet": 20 - guidance}
        line |= {"real_frechet": 12.5, "probe": {"1": [0.5]}}
        with (folder / "assessment.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": s, **line}) + "\n" for s in (500, 1000))
    row = {"metrics": {"fid": 30.0}, "protocol": {"step": 1000, "guidance": 1.5, "workdir": "x"}}
    other = {"metrics": {"fid": 1.0}, "protocol": {}}  # of images of something else
    (folder / "sampled" / "a").mkdir(parents=True)
    (folder / "sampled" / "a" / "results.json").write_text(json.dumps({"rows": [row, other]}))
    data = data_of(folder)
    assert panel(data, "held_out_cross_entropy")["curves"][0]["y"] == [1.25, 1.25]
    assert not [p for p in data["panels"] if p["x"] == "guidance" and "entropy" in p["title"]]
    curves = panel(data, "frechet")["curves"]
    assert [(c["label"], c["reference"], c["y"]) for c in curves[:3]] == [
        ("guidance 1", False, [19, 19]), ("guidance 2", False, [18, 18]), ("guidance 1", True, [12.5, 12.5]),
    ]  # fmt: skip
    assert panel(data, "fid")["curves"][0]["y"] == [30] and not panel(data, "fid")["published"]


def test_limits_stand_beside_what_they_limit(tmp_path):
    """A line of today, and the class accuracy that the run found itself."""
    folder = write_run(
        tmp_path / "run", llamagen.get_config("fashion_mnist"), events=[{"event": "finished"}]
    )
    values = {"frechet_efficientnet_lite0": 200.0, "class_accuracy": 0.75, "frechet": 5.0}
    floors = {"real_frechet_images": 180.0, "real_class_accuracy": 0.875, "real_frechet": 4.0}
    line = {"step": 500, "protocol": {"reference": ""}, **values, **floors}
    other = {"step": 500, "protocol": {"reference": "x.npz"}, **values, **floors}
    write_lines(folder / "assessment.jsonl", [line, other])
    (folder / "agreement.json").write_text('{"samples": 0.5, "real_through_tokenizer": 0.875}')
    data = data_of(folder)
    assert {p["section"] for p in data["panels"]} == {"Validation and samples"}
    drawn = lambda name: [(c["reference"], *c["y"]) for c in panel(data, name)["curves"]]
    to_images = "frechet_efficientnet_lite0"  # whose limit is that of the held-out images alone
    assert drawn(to_images) == [(False, 200), (False, 200), (True, 180)]
    assert sorted(drawn("class_accuracy")) == [
        (False, 0.5), (False, 0.75), (False, 0.75), (True, 0.875), (True, 0.875), (True, 0.875),
    ]  # fmt: skip
    assert panel(data, "class_accuracy")["unit"] == "share, 0 to 1"


def test_runs_that_have_little(tmp_path):
    """Nothing yet, one step, a loss that is none, damaged lines: a page all the same."""
    config = llamagen.get_config()
    nothing = write_run(tmp_path / "nothing", config)
    (nothing / "metrics.jsonl").unlink()
    entries = {1: {"loss": float("nan"), "cross_entropy": 5.0}}
    one = write_run(tmp_path / "one", config, entries, [{"event": "not_finite", "step": 2}])
    damaged = write_run(tmp_path / "damaged", config, {s: {"loss": float(s)} for s in range(1, 6)})
    lines = (damaged / "metrics.jsonl").read_text().splitlines()
    lines[1:3] = ['{"step": 2, "lo', "[" * 5000]
    (damaged / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 6, "loss": 6']))  # at work
    data = data_of(nothing, one, damaged)
    assert data["notes"] == ["damaged: metrics.jsonl: left out, for it is damaged: line 2, 3"]
    assert [c["x"] for c in panel(data, "loss")["curves"]] == [[1, 4, 5]]
    assert panel(data, "cross_entropy")["curves"][0]["y"] == [5.0]
    assert [cell(data, i, "steps") for i in range(3)] == ["0 of 1,800", "1 of 1,800", "5 of 1,800"]
    assert cell(data, 1, "state") == "stopped (not_finite)"
    assert cell(data, 1, "hours of training") == "–"


def test_state(tmp_path):
    run = write_run(tmp_path / "run", llamagen.get_config(), events=[{"event": "finished"}])
    assert cell(data_of(run), 0, "state") == "finished"
    (run / "lock.json").write_text("{}")
    assert cell(data_of(run), 0, "state") == "at work"
    os.utime(run / "lock.json", (time.time() - 60,) * 2)  # of a process that was killed
    assert cell(data_of(run), 0, "state") == "finished"


def test_long_curves_are_thinned_out(tmp_path):
    run = write_run(tmp_path / "run", llamagen.get_config())
    write_lines(run / "metrics.jsonl", [{"step": s, "loss": s % 2} for s in range(1, 30_001)])
    data = data_of(run)
    (curve,) = panel(data, "loss")["curves"]
    assert len(curve["x"]) == len(curve["y"]) == len(curve["smooth"]) <= 2001
    assert (curve["x"][0], curve["x"][-1]) == (1, 30_000)
    assert abs(curve["smooth"][-1] - 0.5) < 0.01  # the average of all, not of those drawn
    assert "30,000 logged steps" in data["notes"][0]


def test_grids_fit_in_their_room(tmp_path):
    run = write_run(tmp_path / "run", llamagen.get_config(), samples=range(0, 1000, 100))
    samples = {s: run / "samples" / f"step_{s:07d}.png" for s in range(0, 1000, 100)}
    found, left_out = grids.embed(samples, 10**6)
    assert [step for step, _ in found] == [*samples] and not left_out
    assert base64.b64decode(found[3][1].partition(",")[2]) == samples[300].read_bytes()
    found, left_out = grids.embed(samples, 4 * len(found[-1][1]))
    assert [step for step, _ in found] == [0, 300, 600, 900] and left_out == 6
    samples[300].write_bytes(b"\x89PNG damaged")
    found, left_out = grids.embed(samples, 10**6)
    assert {step for step, _ in found} == {*samples} - {300} and left_out == 1
    noise = np.random.default_rng(0).integers(0, 255, (100, 1200, 3), np.uint8)
    pictures.save_picture(samples[900], noise)
    ((step, uri),), left_out = grids.embed(samples, 1)
    assert (step, left_out, uri[:16]) == (900, 9, "data:image/webp;")
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (1000, 83)


def test_text_of_files_is_never_html_and_nothing_is_loaded(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    run = write_run(
        tmp_path / evil, llamagen.get_config(), {1: {evil: 1.0}}, [{"event": "</script>" + evil}]
    )
    html, _ = page.make([str(run)])
    before, plotly, after = html.partition(sys.modules["plotly.offline"].get_plotlyjs())
    assert plotly
    ours = before + after
    assert "<img" not in ours and ours.count("</script>") == 3
    assert "default-src 'none'" in before
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|<link", ours.partition('id="data">')[0])
    assert not re.search(r"https?:|@import|url\(|<link", after)


def test_the_program(tmp_path, imagenet, capsys, monkeypatch):
    runs = [str(run) for run in imagenet]
    report._FLAGS(["report", f"--out={tmp_path}/page.html"])
    report.main(["report", *runs, runs[0]])  # the same twice is one run
    assert "runs: 2" in capsys.readouterr().out
    assert (tmp_path / "page.html").stat().st_size > 10**6
    assert str(tmp_path) in exit_message(report.main, ["report", runs[0], str(tmp_path)])
    exit_message(report.main, ["report"])
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert ".[report]" in refusal(page.make, [str(imagenet[0])])


def test_it_starts_without_jax():
    program = "import sys, mirai_jax.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0


def test_a_run_in_a_bucket(imagenet):
    pytest.importorskip("fsspec")
    files.upload(imagenet[0], paths.at("memory://runs/one"), last="config.json")
    data, here = data_of("memory://runs/one"), data_of(imagenet[0])
    assert data["panels"] == here["panels"]
    assert [s for s, _ in data["runs"][0]["samples"]] == [1000, 2000, 3000]


SIZES = """<script>setTimeout(() => {
  const wide = [...document.querySelectorAll(".card, .plot, .plot svg, nav, img")]
    .filter(e => e.getBoundingClientRect().right > innerWidth);
  const titles = [...document.querySelectorAll(".plot")].filter(e => e.querySelector(".xtitle") && e.querySelector(".ytitle"));
  const curves = document.querySelectorAll(".plot .trace").length;
  console.log(`SIZES ${innerWidth} ${document.documentElement.scrollWidth} ${wide.length} ${titles.length} ${curves}`);
}, 3000)</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", (1400, 400))
def test_in_a_browser(tmp_path, imagenet, width):
    """No error, nothing wider than the screen, every panel drawn with both axes named."""
    html, _ = page.make([str(run) for run in imagenet])
    (tmp_path / "page.html").write_text(html.replace("</body>", SIZES + "</body>"))
    # A window is never narrower than 500 pixels; a frame is.
    frame = (
        f'<body style="margin: 0"><iframe src="page.html" width="{width}" height="3000"></iframe>'
    )
    (tmp_path / "frame.html").write_text(frame)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chrome",
         "--enable-logging=stderr", "--virtual-time-budget=8000", "--window-size=1500,3000",
         f"--screenshot={tmp_path}/page.png", f"file://{tmp_path}/frame.html"],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    (found,) = [line for line in lines if "SIZES" in line]
    assert len(lines) == 1, lines  # no error, no refused request
    inner, scroll, wide, named, curves = map(
        int, re.findall(r"\d+", found.partition("SIZES")[2])[:5]
    )
    assert inner == width and scroll <= width and wide == 0
    data = data_of(*imagenet)
    assert named == len(data["panels"]) and curves >= sum(len(p["curves"]) for p in data["panels"])
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 500
