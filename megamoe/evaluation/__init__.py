"""How well a model predicts texts: sets of them, read in blocks or document by document, scored under any layout."""
