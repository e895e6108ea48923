"""What the scripts share is equal to the letter: they differ from simpo_neg.py in the blocks that are named here."""

import ast
import re

import pytest
from conftest import ROOT

# Per script the blocks that are its own, by the start of their names; see `blocks`. A baseline is one more line.
OWN = {
    "simpo_exp.py": ["docstring", "Args.power", "Args.epsilon", "reweight"],
    "simpo_power.py": ["docstring", "Args.power", "Args.epsilon", "reweight"],
}


def blocks(path):
    """The text of a script in named blocks, in order; joined, they are the whole file.

    They are: docstring; imports and constants; Args; a block Args.NAME per field; each function and class; and the
    main program cut at its comments that stand after an empty line, named by them: "# Act with one draw from ...".
    """
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    starts = {0: "docstring"}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))]) - 1
        if isinstance(node, ast.Import) and "imports and constants" not in starts.values():
            starts[first] = "imports and constants"
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            starts[first] = node.name
            if node.name == "Args":
                fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
                starts |= {x.lineno - 1: f"Args.{x.target.id}" for x in fields}
                starts |= {x.lineno - 1: f"Args.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
        if isinstance(node, ast.If):
            starts[first] = "main"
            for i in range(first, len(lines)):
                if re.match(r" +# ", lines[i]) and not lines[i - 1].strip():
                    starts[i] = lines[i].strip()
    bounds = [*sorted(starts), len(lines)]
    assert len(set(starts.values())) == len(starts)
    result = {starts[a]: "".join(lines[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)}
    assert "".join(result.values()) == text
    return result


def shared(path, own):
    """The blocks that are not its own, with calls of reweight cut to what all variants have."""
    shared = {name: text for name, text in blocks(path).items() if not name.startswith(tuple(own))}
    return {name: re.sub(r"(reweight\(particle_q, [^)]*?)(, args\.\w+)+\)", r"\1)", x) for name, x in shared.items()}


@pytest.mark.parametrize("script", OWN)
def test_shared_blocks_are_equal_to_the_letter(script):
    theirs, ours = shared(ROOT / script, OWN[script]), shared(ROOT / "simpo_neg.py", OWN[script])
    assert list(theirs) == list(ours)
    for name, text in ours.items():
        assert theirs[name].splitlines() == text.splitlines(), name
    assert len(ours) > 40 and sum(len(x.splitlines()) for x in ours.values()) > 500


@pytest.mark.parametrize("script", ["simpo_exp", "simpo_power", "simpo_neg"])
def test_each_reads_in_one_sitting(script):
    assert len((ROOT / f"{script}.py").read_text().splitlines()) <= 590
