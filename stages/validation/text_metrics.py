"""Completions against references, as numbers: pure functions of texts; BLEU and chrF are sacrebleu's, ROUGE is rouge-score's.

Ranges: BLEU and chrF 0 to 100 (sacrebleu's defaults: tokenizer 13a, exponential smoothing; chrF2), everything else 0 to 1. rouge-score reads a-z and
0-9 only, without stemming here: in other scripts it is 0.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

Texts = Sequence[str]


def normalised(text: str) -> str:
    """What exact match compares: NFKC, casefolded, runs of whitespace as one space, none at the ends. Punctuation counts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(completions: Texts, references: Texts) -> dict[str, float]:
    """Share of completions that are their reference once both are normalised."""
    equal = [normalised(mine) == normalised(theirs) for mine, theirs in zip(completions, references, strict=True)]
    return {"exact_match": sum(equal) / len(equal)}


def bleu(completions: Texts, references: Texts) -> dict[str, float]:
    """Corpus BLEU (Papineni et al. 2002) of one reference each, 0 to 100."""
    from sacrebleu import corpus_bleu

    return {"bleu": float(corpus_bleu(list(completions), [list(references)]).score)}


def chrf(completions: Texts, references: Texts) -> dict[str, float]:
    """Corpus chrF2 (Popović 2015) of one reference each, 0 to 100."""
    from sacrebleu import corpus_chrf

    return {"chrf": float(corpus_chrf(list(completions), [list(references)]).score)}


def rouge(completions: Texts, references: Texts) -> dict[str, float]:
    """Mean over rows of the F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), use_stemmer=False)
    found = [scorer.score(target, prediction) for prediction, target in zip(completions, references, strict=True)]
    return {name: sum(row[name].fmeasure for row in found) / len(found) for name in names}


def classified(predicted: Texts, references: Texts) -> dict[str, float]:
    """Share of labels told right, and the mean over labels (those of references and predictions) of F1 = 2 TP / (2 TP + FP + FN).

    A blank reference stands for none of the labels: no prediction is right, and it has no F1 of its own.
    """
    pairs = list(zip(predicted, references, strict=True))
    f1 = []
    for label in sorted({*predicted, *references} - {""}):
        right = sum(mine == theirs == label for mine, theirs in pairs)
        wrong = sum((mine == label) != (theirs == label) for mine, theirs in pairs)
        f1.append(2 * right / (2 * right + wrong))
    return {"accuracy": sum(mine == theirs for mine, theirs in pairs) / len(pairs), "macro_f1": sum(f1) / len(f1)}


COMPARE = {"exact_match": exact_match, "bleu": bleu, "chrf": chrf, "rouge": rouge}
PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
EXTRA = "metrics"
