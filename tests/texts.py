"""Passages and questions that many tests share."""

TREATY = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe."
RIVERS = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."
CURIE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
NUT_GRAF = "A nut graf is the paragraph that tells the story in a nutshell."
DELEGATES = [f"{1600 + i} saw delegate number {i} sign the treaty of Westphalia" for i in range(5)]
QUESTION = "Who signed it?"
