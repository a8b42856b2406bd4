"""The loader of the public MiMo-Audio code, which the parity tests share, on a repository made here."""

import subprocess
import sys

import pytest
from public_mimo_audio import VARIABLE, public_package, public_text


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with one package, and a bare clone of it."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "clone" / "src" / "public_example").mkdir(parents=True)
    (folder / "clone" / "src" / "public_example" / "__init__.py").write_text("VALUE = 3\n")
    git = ["git", "-C", str(folder / "clone"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(folder / "clone"), str(folder / "bare")], check=True)
    return folder


@pytest.mark.parametrize("place", ["clone", "clone/src", "clone/.git", "bare"])
def test_every_form_of_the_source_is_read(place, clone, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(clone / place))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "public_example", raising=False)
    assert public_text("src/public_example/__init__.py") == "VALUE = 3\n"
    assert public_package("public_example", ("__init__",), tmp_path).VALUE == 3


def test_a_source_that_is_set_but_unusable_fails(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="has no src/one.py"):
        public_text("src/one.py")
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(pytest.skip.Exception):
        public_text("src/one.py")
