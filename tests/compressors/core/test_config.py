"""Configs: retired settings, and settings added later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from nutgraf.compressors import CompressorConfig
from nutgraf.compressors.core.config import added
from nutgraf.compressors.importers import published_class
from nutgraf.compressors.importers.icae import PublishedICAEConfig
from nutgraf.compressors.soft.icae import ICAEConfig


@dataclass
class Old(CompressorConfig):
    method: ClassVar[str] = "old"
    kept: int = 1
    gone: bool = False


@dataclass
class New(CompressorConfig):
    method: ClassVar[str] = "old"
    retired: ClassVar[dict[str, Any]] = {"gone": False}
    retired_unhashed: ClassVar[dict[str, Any]] = {"later": 0}
    kept: int = 1
    more: int = added(3, "came later")


def test_a_retired_setting_is_accepted_at_its_default() -> None:
    config = New.from_dict({"kept": 2, "gone": False, "later": 0})
    assert config == New(kept=2)
    assert config.to_dict() == {"kept": 2}
    assert New(more=4).to_dict() == {"kept": 1, "more": 4}


def test_the_identity_is_that_of_the_old_config() -> None:
    assert New(kept=2).identity() == Old(kept=2).identity()


@pytest.mark.parametrize("setting", [{"gone": True}, {"later": 7}])
def test_another_value_is_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=rf"no longer has the setting {next(iter(setting))}.*got {next(iter(setting.values()))}"
    ):
        New.from_dict(setting)
    with pytest.raises(ValueError, match=r"has no settings \['other'\]"):
        New.from_dict({**setting, "other": 1})


def test_settings_of_a_release_pick_the_class_that_reproduces_it() -> None:
    old = {"mem_size": 4, "fixed_slots": False, "bos": True, "truncate": None}
    assert published_class("icae", old) is None
    found = published_class("icae", {**old, "fixed_slots": True})
    assert found is not None
    assert found.config_class is PublishedICAEConfig
    assert published_class("mean-pool", {"bos": False}) is None
    assert set(PublishedICAEConfig().identity()) == set(ICAEConfig().identity())
