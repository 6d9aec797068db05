"""Tasks of multiple choice, zero- and few-shot, by what a language model thinks of each choice."""
