"""The benchmark of packing: it runs, and what is committed is what the policies give."""

import json
import subprocess
import sys
from pathlib import Path

from effpass.rows.policies import POLICIES
from tests.scripts import EXAMPLES, load

RESULT = EXAMPLES.parent / "docs" / "results" / "packing_rate.json"


def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "rates.json"
    script = EXAMPLES / "benchmarks" / "packing_rate.py"
    command = [sys.executable, str(script), "--sequences=300", "--seeds=2", f"--out={out}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "arrival: at most" in done.stdout and "(paper: 19.10%)" in done.stdout
    result = json.loads(out.read_text())
    assert {row["policy"] for row in result["packed"]} == set(POLICIES)
    assert all(len(row["rates"]) == 2 for row in result["packed"])


def test_the_committed_rates_are_those_of_this_code() -> None:
    result = json.loads(RESULT.read_text())
    count = result["corpora"][0]["sequences"]
    again = json.loads(json.dumps(load("benchmarks/packing_rate.py").measure(count, seeds=1)))
    assert again["corpora"] == result["corpora"][:1]
    for mine, committed in zip(again["packed"], result["packed"], strict=True):
        assert mine == {**committed, "rates": committed["rates"][:1]}


def test_goals_are_met_and_the_page_tells_the_rates() -> None:
    result = json.loads(RESULT.read_text())
    worst = {row["policy"]: max(row["rates"]) for row in result["packed"] if row["window"] is None}
    assert set(worst) == set(POLICIES) and set(result["goal"]) == {"greedy"}
    assert all(worst[policy] < limit for policy, limit in result["goal"].items())
    page = (EXAMPLES.parent / "docs" / "packing.md").read_text()
    for policy, rate in worst.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{policy}`")]
        assert f"| {100 * rate:.2f} % |" in line
        if policy in result["paper"]:
            assert f"| {100 * result['paper'][policy]:.3g} % |" in line
    assert f"leave {100 * max(result['padded_to_the_longest']):.2f} % empty" in page
