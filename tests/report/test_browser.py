import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from drgr.report import write_report

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DISABLED = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
HOW = (
    "no Chromium found; install it (Debian: apt-get install --no-install-recommends chromium) or "
    "put an executable named " + ", ".join(NAMES) + " on the PATH"
)


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is not None:
        return found
    if os.environ.get("CI") or os.environ.get("DRGR_REQUIRE_BROWSER"):
        pytest.fail(HOW)
    pytest.skip(HOW)


def open_page(chromium: str, page: Path, profile: Path) -> tuple[str, list[str]]:
    """Returns the drawn page and every line that it wrote to the console."""
    options = (
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        "--window-size=1400,3000",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        *(f"--disable-{feature}" for feature in DISABLED),
        f"--user-data-dir={profile}",
    )
    done = subprocess.run(
        [chromium, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def drawn_charts(dom: str) -> int:
    """Counts charts whose drawing is in place: one hover layer in each."""
    return len(re.findall(r'class="hoverlayer"', dom))


def embedded_charts(dom: str) -> int:
    return len(re.findall(r'class="figure-data"', dom))


@pytest.mark.slow
@pytest.mark.parametrize(("names", "expected"), [(("robust",), 14), (("plain", "robust"), 31)])
def test_every_chart_is_drawn_without_a_console_message(
    chromium, make_run, tmp_path, names, expected
):
    runs = [make_run(name, robust=name == "robust") for name in names]
    report = write_report(runs, output=tmp_path / "report.html")
    dom, console = open_page(chromium, report, tmp_path / "profile")
    assert console == []
    assert embedded_charts(dom) == drawn_charts(dom) == expected
    assert f'data-charts="{expected}"' in dom


@pytest.mark.slow
def test_hostile_names_run_nothing(chromium, make_run, tmp_path):
    domains = ("<script>alert(1)</script>", "<img src=x onerror=console.error(1)>", "</script>")
    run = make_run(domains=domains, interrupted=True)
    report = write_report([run], output=tmp_path / "report.html")
    dom, console = open_page(chromium, report, tmp_path / "profile")
    assert console == []
    assert drawn_charts(dom) == 12
    assert "<img" not in dom


@pytest.mark.slow
def test_legend_and_selector_change_what_is_shown(chromium, make_run, tmp_path):
    report = write_report([make_run()], output=tmp_path / "report.html")
    probe = """
<script>
setTimeout(function () {
  document.querySelector('.domain-legend .chip').click();
  var select = document.querySelector('[data-kind="domain-map"] select');
  select.value = "2";
  select.dispatchEvent(new Event("change"));
  setTimeout(function () {
    var shown = function (kind) {
      var chart = document.querySelector('[data-kind="' + kind + '"] .chart');
      return chart.data.map(function (trace) { return trace.visible === false ? 0 : 1; }).join("");
    };
    document.body.dataset.shown = shown("loss-curves") + " " + shown("domain-map");
  }, 500);
}, 1500);
</script>
</body>"""
    text = report.read_text(encoding="utf-8")
    report.write_text(text.replace("</body>", probe), encoding="utf-8")
    dom, console = open_page(chromium, report, tmp_path / "profile")
    assert console == []
    # The legend and the curves both begin with the worst domain.
    assert 'data-shown="01111111 0010"' in dom


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Plotly.newPlot(", "Plotly.newPlott("),
        ("</main>", "</main><script src='https://example.invalid/a.js'></script>"),
    ],
    ids=["broken script", "network access"],
)
def test_a_broken_page_is_noticed(chromium, make_run, tmp_path, old, new):
    report = write_report([make_run()], output=tmp_path / "report.html")
    text = report.read_text(encoding="utf-8")
    assert old in text
    head, _, tail = text.rpartition(old)
    report.write_text(head + new + tail, encoding="utf-8")
    _, console = open_page(chromium, report, tmp_path / "profile")
    assert console
