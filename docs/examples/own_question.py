"""Which heads look at punctuation?"""

from dataclasses import dataclass

import headwise as hw
from headwise.scan import Prompt, Question


@dataclass(frozen=True)
class PunctuationHeads(Question):
    """The mean attention to full stops and commas, from every token that comes after one."""

    text: str = "The cat sat, slept, and woke. It was hungry, so it ate. Then it slept again."
    paper = hw.Paper("What Does BERT Look At? An Analysis of BERT's Attention", "1906.04341")
    title, unit, higher = "Punctuation heads", "share of attention", "looks at full stops and commas"
    what = "Mean attention to full stops and commas."

    def prompts(self, opened):
        spans = {"punctuation": [(i, i + 1) for i, c in enumerate(self.text) if c in ".,"]}
        segments = hw.Segments.from_characters(self.text, spans, opened.tokenizer)
        return [Prompt(opened.encode(self.text), {"text": segments})]

    def readings(self, opened):
        return [hw.Mass(("punctuation",), per="head")]

    def score(self, values):
        return values["mass"].sel(segment="punctuation")


if __name__ == "__main__":
    print(hw.scan.heads("zoo:llm", questions=[PunctuationHeads()]).top("punctuation_heads", 5))
