"""What tab completion and help() show: public names, typed, described and kept."""

import importlib
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from public_names import GATHERING, LIST, MODULES, public_names, written_names

import dpo_mini

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_UNDERSCORE = {  # the package's own, or the museum's pieces: called there, not completed
    "dpo_mini.losses": {"B"},
    "dpo_mini.policies": {
        "HasSizes",
        "check_completions",
        "check_sizes",
        "device_of",
        "read_for_prompts",
        "shares_storage",
    },
    "dpo_mini.progress": {"in_notebook"},
    "dpo_mini.rollout": {
        "Loss",
        "Prefixes",
        "Progress",
        "batch_tree",
        "begin",
        "body_and_heads",
        "check_same_sizes",
        "extend",
        "of_rows",
        "of_tokens",
        "read_tree",
        "split",
    },
    "dpo_mini.train": {
        "Progress",
        "WEIGHTS",
        "adam",
        "check_frozen",
        "check_gradient",
        "check_prompts_and_reference",
        "check_pair_loss",
        "check_pairs",
        "check_settings",
        "descend",
        "draw_prompts",
        "pair_measures",
        "record",
        "scores_of",
        "shuffled_batches",
    },
}
WRITTEN = [name for name in MODULES if name not in ("dpo_mini", "dpo_mini.real")]


def load(name: str) -> ModuleType:
    if name == "dpo_mini.real":
        pytest.importorskip("transformers", reason="the extra 'real' is not installed")
    return importlib.import_module(name)


def members(name: str):
    """Each public function of a module and each method of its public classes, by their names."""
    module = load(name)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isfunction(value):
            yield public, value
        for attribute, raw in vars(value).items() if inspect.isclass(value) else ():
            method = raw.fget if isinstance(raw, property) else getattr(value, attribute)
            if not attribute.startswith("_") and inspect.isroutine(method):
                yield f"{public}.{attribute}", inspect.unwrap(getattr(method, "__func__", method))


ALL = [
    pytest.param(value, id=f"{module.removeprefix('dpo_mini.')}.{name}")
    for module in MODULES
    if module != "dpo_mini.real" or importlib.util.find_spec("transformers")
    for name, value in members(module)
]


# --- names -----------------------------------------------------------------------------------


def test_every_module_and_folder_without_an_underscore_says_what_is_public():
    """One without `__all__` would be in no list that is made from these."""
    package = ROOT / "dpo_mini"
    tops = {path.stem for path in package.glob("*.py")}
    tops |= {path.parent.name for path in package.glob("*/*.py")}
    tops = {f"dpo_mini.{name}" for name in tops if not name.startswith("_")}
    assert tops < set(MODULES)
    assert {"dpo_mini.policies", "dpo_mini.real", "dpo_mini.rollout"} <= set(GATHERING)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_module_says_all_that_it_has_in_its_own_order(name):
    module = load(name)
    hidden, folder = WITHOUT_UNDERSCORE.get(name, set()), Path(module.__file__).parent
    if name in GATHERING:
        files = sorted(folder.glob("*.py"))
        in_files = [own for own in map(written_names, files) if own]
        everything = {own_name for own in in_files for own_name in own}
        assert everything == {*module.__all__, *hidden}
        for own in in_files:
            shown = [own_name for own_name in module.__all__ if own_name in own]
            assert shown == [own_name for own_name in own if own_name not in hidden]
        return
    own = written_names(Path(module.__file__))
    if name == "dpo_mini.checks.museum":  # its exhibits are reached by `exhibit(name)`
        own = [name for name in own if name in module.__all__]
    assert module.__all__ == [own_name for own_name in own if own_name not in hidden]


@pytest.mark.parametrize("name", MODULES[1:])
def test_dir_shows_public_names_alone(name):
    assert dir(load(name)) == sorted(load(name).__all__)


@pytest.mark.parametrize("use_jedi", [False, True])
def test_tab_completion_in_a_notebook_shows_what_a_user_may_call(use_jedi):
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    from IPython.core.completer import provisionalcompleter

    shell = interactive.InteractiveShell()
    shell.Completer.use_jedi = use_jedi
    shell.user_ns.update(dpo_mini=dpo_mini, losses=dpo_mini.losses)

    def offered(text: str) -> set[str]:
        with provisionalcompleter(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of IPython's own parts to one another
            found = [match.text for match in shell.Completer.completions(text, len(text))]
        return {text.removeprefix(".") for text in found}

    tops = {name.removeprefix("dpo_mini.") for name in MODULES if name.count(".") == 1}
    if not importlib.util.find_spec("transformers"):
        tops.remove("real")
    assert offered("dpo_mini.") == tops > set(dpo_mini.__all__)
    assert offered("losses.") == set(dpo_mini.losses.__all__)
    assert offered("dpo_mini.plotting.") == set(load("dpo_mini.plotting").__all__)


def test_what_is_slow_to_import_is_imported_when_it_is_asked_for():
    script = (
        "import sys, dpo_mini; dir(dpo_mini); print('matplotlib' in sys.modules); "
        "dpo_mini.plotting.axes; print('matplotlib' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'plottin'"):
        dpo_mini.plottin  # noqa: B018


# --- docstrings ------------------------------------------------------------------------------


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def named_in(doc: str) -> set[str]:
    """The words of a docstring, and those of the docstrings that it sends its reader to."""
    found = words(doc)
    for other in re.findall(r"(?:as|as in|are those of|signature of) `([\w.]+)`", doc, re.I):
        for param in ALL:
            if f".{param.id}".lower().endswith(f".{other}".lower()):
                found |= words(inspect.getdoc(param.values[0]))
    return found


@pytest.mark.parametrize("function", ALL)
def test_a_signature_is_typed(function):
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.name not in ("self", "cls"):
            assert parameter.annotation is not parameter.empty, parameter.name
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("function", ALL)
def test_a_docstring_says_what_goes_in_what_comes_out_and_what_is_refused(function):
    doc = inspect.getdoc(function)
    assert doc, "no docstring"
    assert doc.split("\n\n")[0].rstrip().endswith((".", ":")), "a summary is a sentence"
    signature = inspect.signature(function)
    arguments = [name for name in signature.parameters if name not in ("self", "cls")]
    missing = [name for name in arguments if name not in named_in(doc)]
    assert not missing, f"says nothing of {missing}"
    if "Args:" in doc and signature.return_annotation not in (None, "None"):
        assert re.search(r"Returns?:|Yields:", doc), "says nothing of what comes out"
    refuses = re.search(r"raise \w+Error|\bcheck_\w+\(", inspect.getsource(function))
    if refuses and not isinstance(function, property):
        assert re.search(r"Raises|[Ee]rrors|Error|[Rr]efuse|NotImplemented", doc), "refuses what?"


@pytest.mark.parametrize("name", dpo_mini.losses.__all__)
def test_a_loss_has_its_formula_its_shape_and_its_source(name):
    doc = inspect.getdoc(getattr(dpo_mini.losses, name))
    assert "$" in doc.split("\n\n")[0]
    assert "`[B]`" in doc
    assert re.search(r"Errors|errors|Raises", doc), "refuses what?"
    assert re.search(r"^Source: .+", doc, re.M)


# --- kept, or given up on purpose -----------------------------------------------------------------


def test_no_public_name_or_argument_goes_or_comes_unnoticed():
    pytest.importorskip("transformers", reason="the extra 'real' is not installed")
    committed, now = LIST.read_text(encoding="utf-8").splitlines(), public_names()
    gone, new = sorted(set(committed) - set(now)), sorted(set(now) - set(committed))
    assert not gone, (
        f"gone or changed: {gone}. If that is meant, say so in CHANGELOG.md and run: "
        "python tools/public_names.py"
    )
    assert not new, f"new: {new}. To make them public run: python tools/public_names.py"


def test_every_public_module_has_its_page_in_the_reference():
    sys.path.insert(0, str(ROOT / "docs"))
    import stage

    pages = {f"dpo_mini.{name}" for names in stage.API.values() for name in names}
    assert pages == set(MODULES) - {"dpo_mini"}
