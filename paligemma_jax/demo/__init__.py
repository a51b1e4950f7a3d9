"""The embedded demo model and the synthetic world of shapes and words that it is trained on."""
