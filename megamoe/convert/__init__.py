"""Conversion between megamoe checkpoints and other formats: tables of links, proved before a byte moves. No torch."""
