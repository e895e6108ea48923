"""The pages say what is: excerpts are the scripts' lines, links lead somewhere, flags exist, README.md is one page."""

import ast
import re
import shlex
import textwrap

import gymnasium as gym
import pytest
import torch
from conftest import ROOT

PAGES = ["README.md", "benchmark/README.md", "benchmark/bandit/README.md"]
PAGES += ["docs/departures.md", "docs/paper_beside_code.md"]
PAPER = (ROOT / "docs/paper_beside_code.md").read_text()
EXCERPTS = re.findall(r"^\[`\S+`\]\(\.\./(\S+)\), `(\S+)`:\n\n```python\n((?:.*\n)*?)```", PAPER, flags=re.M)


def source(file, name):
    """Lines of a function, Class.method or class of a file, or of `main`, what stands under `if __name__`."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        if part == "main":
            (node,) = [x for x in node.body if isinstance(x, ast.If) and "__name__" in ast.unparse(x.test)]
        else:
            (node,) = [x for x in node.body if getattr(x, "name", None) == part]
    return text.splitlines()[node.lineno - 1 : node.end_lineno]


def stands_in(excerpt, lines):
    excerpt = textwrap.dedent(excerpt).splitlines()
    windows = (lines[i : i + len(excerpt)] for i in range(len(lines)))
    return any(textwrap.dedent("\n".join(window)).splitlines() == excerpt for window in windows)


@pytest.mark.parametrize("file, name, excerpt", EXCERPTS, ids=[f"{file}-{name}" for file, name, _ in EXCERPTS])
def test_excerpts_are_the_scripts_lines(file, name, excerpt):
    assert stands_in(excerpt, source(file, name)), f"not in {file}, {name}:\n{excerpt}"


def test_an_excerpt_that_is_not_there_is_seen():
    lines = source("simpo_neg.py", "DiffusionPolicy.loss")
    assert stands_in("alpha, sigma = self.step_coefficients[i, :2].split(1, dim=-1)  # (B, K, 1)\n", lines)
    assert not stands_in("alpha, sigma = self.step_coefficients[i, :2].split(1, dim=-1)  # (B, K, 2)\n", lines)
    assert not stands_in(f"{lines[1]}\n{lines[3]}\n", lines)


def test_every_equation_stands_once_and_every_excerpt_is_checked():
    assert re.findall(r"\\tag\{(\d+)\}", PAPER) == [str(number) for number in range(1, 31)]
    assert len(EXCERPTS) == PAPER.count("```python") > 30
    for name in ["Example 3.1", "Example 3.2", "Example 3.3", "Example 3.4", "Theorem 3.5", "Algorithm 1", "Table 1"]:
        assert re.search(f"^### .*{name}", PAPER, flags=re.M), name


def anchors(page):
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall("^#+ (.+)$", re.sub("^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchors(target).count(anchor) == 1, link


def commands(page):
    """The commands `python SCRIPT ...` of a page: lines of code, continued by a backslash, and code within a line.

    Functions of the shell, NAME() { python ... "$@"; }, and variables in capitals are put in.
    """
    text = re.sub(r" \\\n *", " ", (ROOT / page).read_text())
    definition = r'^    (\w+)\(\) { (python .+?) "\$@"; }'
    functions, text = re.findall(definition, text, flags=re.M), re.sub(definition, "", text, flags=re.M)
    for name, body in functions:
        text = re.sub(rf"(^    |; ){name} ", rf"\1{body} ", text, flags=re.M)
    while found := re.search(r'\b([A-Z]+)="([^"$]*)"(?=[; \n])', text):  # of some the value has others in it
        text = text.replace(found[0], "").replace(f"${found[1]}", found[2])
    code = re.findall("^    (.+)$", text, flags=re.M) + re.findall("`([^`\n]+)`", text)
    for command in re.findall("(?:^|[ &;])python ([^&;\n]+)", "\n".join(code), flags=re.M):
        command = re.sub(r'--frame "[^"]*"(?=.* --frame )', "", command)  # the later one counts
        yield shlex.split(re.sub(r"\$\{[^}]*\}", "", command), comments=True)


def flags_of(script):
    """Names of the fields of Args, inherited ones included, or without Args all words: nothing is imported."""
    text = (ROOT / script).read_text()
    args = [x for x in ast.parse(text).body if getattr(x, "name", None) == "Args"]
    if not args:
        return set(re.findall(r"\w+", text))
    names = {x.target.id for x in args[0].body if isinstance(x, ast.AnnAssign)}
    bases = [f"{ast.unparse(base).removesuffix('.Args')}.py" for base in args[0].bases]
    return names.union({f"no_{name}" for name in names}, {"help"}, *map(flags_of, bases))


@pytest.mark.parametrize("page", PAGES)
def test_commands_use_flags_that_exist(page):
    """`--flag`, and in a sweep `flag=value`, of the script of the command or of those that it runs."""
    changed = re.findall(r"(?:simpo_neg|simpo_noise).py > (\w+\.py)", (ROOT / page).read_text())  # by sed
    for words in commands(page):
        scripts = re.findall(r"(?:^|[ =])([\w./-]+\.py)\b", " ".join(words))
        scripts = ["simpo_neg.py" if script in changed else script for script in scripts]
        flags = re.findall(r"(?:^|(?<= ))--([\w-]+)|([\w-]+)(?==)", " ".join(words))
        unknown = {(a or b).replace("-", "_") for a, b in flags}.difference(*map(flags_of, scripts))
        assert scripts and not unknown, (words, unknown)


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_tests_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    scripts = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if "\nclass Args" in path.read_text()]
    known = set().union(*map(flags_of, scripts))
    assert {flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)", text)} <= known
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    assert set(re.findall(r"`(test_\w+)`", text)) <= set(re.findall(r"def (test_\w+)", tests))


def test_the_policy_in_your_own_script_runs(monkeypatch, tmp_path):
    """The README's lines load what was trained: 200 steps of HalfCheetah return hundreds, untrained ones below 0."""
    (code,) = re.findall("^```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    monkeypatch.chdir(ROOT)
    own = {}
    exec(code, own)
    assert own["action"].shape == (1, 6)
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log file where it is
    env, total, generator = gym.make("HalfCheetah-v4"), 0.0, torch.Generator().manual_seed(1)
    obs, _ = env.reset(seed=1)
    for _ in range(200):
        action = own["policy"].sample(torch.tensor(obs[None], dtype=torch.float32), 1, generator)[0, 0]
        obs, reward, *_ = env.step(action.numpy())
        total += reward
    assert total > 500


def test_readme_is_one_page_with_the_command_of_the_tests():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    assert "pip install -r requirements.txt" in text and "pytest" in text
    assert "python simpo_neg.py --env-id Humanoid-v4 --epsilon 0.5" in text
