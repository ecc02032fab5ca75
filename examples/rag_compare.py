"""The pipelines of `rag_before.py` and `rag_after.py` side by side: answers, prompt tokens and milliseconds to the first token.

Every question is asked twice. The first time its passages are compressed, which costs more than it saves; from then on
(or when they were compressed while they were indexed) they are only read. Run it with ``python examples/rag_compare.py``.
"""

import rag_after
import rag_before
from shared import ask, questions, show

if __name__ == "__main__":
    before, after = rag_before.pipeline(), rag_after.pipeline()
    before.query("Is everything warm?")
    text = ask(before, questions())
    first, again = ask(after, questions()), ask(after, questions())
    show(questions(), text=text, compressed_now=first, compressed_before=again)
    saved = 1 - sum(a.reader_tokens for a in again) / sum(a.reader_tokens for a in text)
    faster = sum(a.ttft_ms for a in text) / sum(a.ttft_ms for a in again)
    print(f"Prompt tokens saved: {saved:.0%}. First token of an answer: {faster:.1f} times as fast as from text.")
