"""Images and text in, boxes and masks out: between user input and the model's arrays."""
