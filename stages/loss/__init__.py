"""The loss of language models on chosen tokens, without the logits of a batch ever being held."""
