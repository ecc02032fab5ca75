"""All attackers, strongest last; importing this module registers them."""

from __future__ import annotations

from .attacker import ATTACKERS, Attacker
from .kept_text import KeptText
from .kv_layers import KVLayers
from .kv_lookup import KVLookup
from .repeat import Repeat

__all__ = ["ATTACKERS", "Attacker", "KVLayers", "KVLookup", "KeptText", "Repeat"]
