"""Texts continued token by token, by any checkpoint under any layout."""
