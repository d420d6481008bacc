"""The page carries its ledger's log and checks itself against it, in a browser that nobody has to trust."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from capsfl.audit import ledger_summary
from capsfl.ledger import ConsensusRules, Ledger, Registration, RoundRecord, Signer, chain_binding, parameters_root
from capsfl.ledger.assembly import assemble_round
from capsfl.report import build_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = ("Ash", "Birch & Söhne <b>", "Cedar", "Dogwood")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, write_study: Callable[..., Path]) -> Path:
    """A study with a real ledger of three rounds in which four hospitals voted, and out-voted the last.

    The third one joined after the others had founded the chain.
    """
    folder = write_study(tmp_path_factory.mktemp("study") / "demo", arms=("federated",))
    owner, members = Signer((7).to_bytes(32, "big")), [Signer((30 + n).to_bytes(32, "big")) for n in range(4)]
    binding = chain_binding("page-1", owner.public_key)
    joined = [Registration.of(m, name, "lung CT", 5, binding) for m, name in zip(members, NAMES, strict=True)]
    signers = {member.hospital_id(): member for member in members}
    ids = list(signers)
    with Ledger.create(
        folder / "federated" / "ledger", signer=owner, chain_id="page-1", registrations=[*joined[:2], joined[3]],
        rules=ConsensusRules(quorum="all"),
    ) as ledger:  # fmt: skip
        ledger.approvers = lambda: members
        ledger.append(joined[2])
        for number in (1, 2, 3):
            leaves = {"w": f"{number:064x}"}
            record = RoundRecord(
                number, "segmentation", parameters_root(leaves), tuple(leaves.items()), NAMES, "all", "1.0", "1.1",
                "4.0", f"{1.2345678 * number}", "1e-05", "0c" * 32, "0.1.0",
            )  # fmt: skip
            errors = {v: {c: 0.9 if c == ids[3] else 0.1 + 0.01 * number for c in ids if c != v} for v in ids}
            updates = dict.fromkeys(ids, f"{number:064x}")
            ledger.append(
                *assemble_round(record, ledger.index, number + 1, signers=signers, updates=updates, errors=errors)
            )
        summary = ledger_summary(ledger, [])
    (folder / "federated" / "ledger.json").write_text(json.dumps(summary))
    return folder


def verdict_of(page: Path) -> str:
    """What the page says of itself once its script has run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={page.parent / 'browser'}", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (found,) = re.findall(r"<span class=\"tone \w+\" data-verdict=\"\">(.*?)</span>", done.stdout)
    return html.unescape(found)


def test_the_page_draws_chain_votes_and_epsilon_and_allows_one_script(study: Path):
    page = build_page(study).read_text()
    assert page.count("out-voted</span>") == 3
    shares = re.findall(r'data-vote="Ash">([\d.]+)<', page)
    assert len(shares) == 3
    assert all(33 < float(share) < 34 for share in shares)
    assert "<b>" not in "".join(re.findall(r'data-vote="(.*?)"', page))
    (policy,) = re.findall(r"script-src ([^;\"]+)", page)
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", policy)
    assert page.count("<script") == 2
    assert "4 approvals" in page


def test_a_study_without_a_log_has_no_script(tmp_path: Path, write_study: Callable[..., Path]):
    assert "<script" not in build_page(write_study(tmp_path / "demo")).read_text()


RARELY = pytest.mark.skipif("CAPSFL_TORTURE" not in os.environ, reason="seconds for a browser each: make torture")
CHANGES = {
    "nothing": ("", ""),
    "an epsilon": (r"<span data-epsilon>2.47", "<span data-epsilon>1.47"),
    "a digest": (r"<code data-digest>\w{4}", "<code data-digest>ffff"),
    "a share": (r'(data-vote="Cedar">)[\d.]+', r"\g<1>90.0"),
    "an out-voted hospital": (r'(data-vote="Dogwood">)<span class="tone bad">out-voted</span>', r"\g<1>25.0"),
    "a block left out of the log": (r"(data-log>)AAA", r"\g<1>"),
    "the root": (r'(data-fact="root">)\w{4}', r"\g<1>0000"),
}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    "change",
    [*list(CHANGES)[:2], *(pytest.param(change, marks=[pytest.mark.torture, RARELY]) for change in list(CHANGES)[2:])],
)
def test_a_browser_finds_the_page_as_signed_or_says_what_is_not(study: Path, tmp_path: Path, change: str):
    old, new = CHANGES[change]
    page = build_page(study).read_text()
    changed = re.sub(old, new, page, count=1) if old else page
    assert (changed == page) == (not old)
    (tmp_path / "page.html").write_text(changed)
    verdict = verdict_of(tmp_path / "page.html")
    if old:
        assert verdict.startswith("FAILED: "), verdict
    else:
        assert verdict == "OK: this page's chain is that of the log it carries: 5 blocks, linked, hashed and signed"
