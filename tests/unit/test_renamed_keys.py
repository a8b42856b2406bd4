"""Files with keys that were renamed or moved still load, with one warning that names the new keys."""

from dataclasses import dataclass

import pytest

from openmimo.core import config as config_io
from openmimo.core.errors import ConfigError
from openmimo.core.fields import PositiveInt, check_fields, renamed_keys, warn_of_renamed


@renamed_keys({"count": "number"})
@dataclass(frozen=True)
class Inner:
    number: PositiveInt = 1
    size: int = 0

    def __post_init__(self):
        check_fields(self, "inner")


@renamed_keys({"inside": "inner", "size": "inner.size"})
@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    name: str = ""


@dataclass(frozen=True)
class Derived(Outer):
    more: tuple[Inner, ...] = ()


def read(config_type, values, capsys, where="file.json"):
    """Returns the config, and the output of reading it."""
    warn_of_renamed.cache_clear()
    capsys.readouterr()
    return config_io.from_dict(config_type, values, where), capsys.readouterr().err


def test_renamed_and_moved_keys_are_read_with_one_warning(capsys):
    made, printed = read(Derived, {"inside": {"count": 3}, "size": 5, "more": [{"count": 2}]}, capsys)
    assert made == Derived(Inner(3, 5), more=(Inner(2),))
    assert printed.count("warning") == 1
    assert "file.json" in printed
    for names in ("inside (now inner)", "size (now inner.size)", "count (now number)"):
        assert names in printed


def test_a_file_of_this_version_is_read_silently(capsys):
    made, printed = read(Outer, config_io.to_dict(Outer(Inner(2, 1), "x")), capsys)
    assert made == Outer(Inner(2, 1), "x")
    assert printed == ""


def test_the_same_file_is_warned_of_once(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"size": 4}')
    _, printed = read(Outer, {"size": 4}, capsys, str(path))
    assert printed.count("warning") == 1
    assert config_io.load(Outer, path) == Outer(Inner(1, 4))
    assert capsys.readouterr().err == ""


def test_an_old_key_together_with_its_new_one_is_refused():
    with pytest.raises(ConfigError, match=r"'count' and also 'number', its new name"):
        config_io.from_dict(Inner, {"count": 1, "number": 2})
    with pytest.raises(ConfigError, match=r"'size' and also 'inner.size'"):
        config_io.from_dict(Outer, {"size": 1, "inner": {"size": 2}})
    with pytest.raises(ConfigError, match=r"inner must be an object"):
        config_io.from_dict(Outer, {"size": 1, "inner": 3})


def test_the_value_of_an_old_key_is_checked():
    with pytest.raises(ConfigError, match=r"inner.number is 0; it must be at least 1"):
        config_io.from_dict(Outer, {"inner": {"count": 0}})
