"""The Hugging Face classes that a megamoe model converts to and from: one module for each kind of class. No torch."""
