"""A LangChain chain that reads retrieved documents compressed and streams its answers.

pip install nutgraf[langchain]
python examples/langchain_rag.py
"""

from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from nutgraf import Reader, load_compressor
from nutgraf.adapters.langchain import CompressedContextDocumentCompressor, CompressedContextLLM
from shared import READER, embedding, passages, questions

reader = Reader.from_pretrained(READER)
compressor = load_compressor("kv-match", reader)
shorten = CompressedContextDocumentCompressor(compressor)
llm = CompressedContextLLM(reader=reader, max_new_tokens=16)
prompt = PromptTemplate.from_template("{context}\n\nQuestion: {question}\nAnswer:")


class MiniLM(Embeddings):
    """The examples' embedding as LangChain embeddings."""

    def __init__(self) -> None:
        self.model = embedding()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents."""
        return self.model.get_text_embedding_batch(texts)

    def embed_query(self, text: str) -> list[float]:
        """Embed a question."""
        return self.model.get_query_embedding(text)


def retrieve() -> Runnable:
    """Retrieve for a question, as text and compressed."""
    index = InMemoryVectorStore.from_texts([node.text for node in passages()], MiniLM())
    retriever = index.as_retriever(search_kwargs={"k": 2})

    def run(question: str) -> dict[str, str]:
        found = retriever.invoke(question)
        compressed = shorten.compress_documents(found, question)
        return {
            "question": question,
            "text": "\n\n".join(document.page_content for document in found),
            "context": "\n\n".join(document.page_content for document in compressed),
        }

    return RunnableLambda(run)


if __name__ == "__main__":
    retrieved, answer = retrieve(), prompt | llm.bind(stop=["\n"]) | StrOutputParser()
    for question in questions():
        context = retrieved.invoke(question)
        print(f"> {question}")
        for piece in answer.stream(context):
            print(piece, end="", flush=True)
        tokens = llm.get_num_tokens(context["text"])
        print(f"\n  ({tokens} tokens read as {tokens / compressor.config.ratio:.0f} keys and values per head)")
