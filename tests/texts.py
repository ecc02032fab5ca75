"""Passages and questions that many tests share."""

import json
from pathlib import Path

TREATY = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe."
RIVERS = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."
CURIE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
NUT_GRAF = "A nut graf is the paragraph that tells the story in a nutshell."
DELEGATES = [f"{1600 + i} saw delegate number {i} sign the treaty of Westphalia" for i in range(5)]
QUESTION = "Who signed it?"
PEOPLE = {"Ada": "Bergen", "Ivar": "Oslo", "Mary": "Lima", "Omar": "Cairo", "Nora": "Kyoto", "Hugo": "Quito"}


def write_people(file: Path) -> None:
    """Writes a question file: where each of `PEOPLE` lives; the halves in turns."""
    rows = []
    for number, (person, city) in enumerate(PEOPLE.items()):
        text = f"{person} lives in {city} by the river, in a house of {number + 2} rooms with a garden and a well."
        row = {"id": str(number), "question": f"Where does {person} live?", "answers": [city], "source": "toy"}
        rows.append(
            {**row, "passages": [{"title": "", "text": text}], "gold": 0, "half": ("tune", "report")[number % 2]}
        )
    file.write_text("\n".join(map(json.dumps, rows)))
