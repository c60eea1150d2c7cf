"""Metrics that run where the tensors are; docs/metrics.md."""

from tensormill.metrics.bleu import Bleu, Scoring, bleu_reward, corpus_bleu, sentence_bleu

__all__ = ["Bleu", "Scoring", "bleu_reward", "corpus_bleu", "sentence_bleu"]
