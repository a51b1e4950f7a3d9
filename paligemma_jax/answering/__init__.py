"""From pictures and prompts to answers, in batches: what a pipeline is made of."""
