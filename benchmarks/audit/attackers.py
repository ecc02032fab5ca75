"""All attackers, strongest last; importing this module registers them."""

from __future__ import annotations

from .attacker import ATTACKERS, Attacker
from .bag_of_words import BagOfWords
from .geia import GEIA
from .kept_text import KeptText
from .kv_layers import KVLayers
from .kv_lookup import KVLookup
from .repeat import Repeat
from .slot_words import SlotWords
from .transfer import Transfer
from .vec2text import Vec2Text

__all__ = [
    "ATTACKERS",
    "GEIA",
    "Attacker",
    "BagOfWords",
    "KVLayers",
    "KVLookup",
    "KeptText",
    "Repeat",
    "SlotWords",
    "Transfer",
    "Vec2Text",
]
