"""The operator's words, turned into frozen typed values. Imports no torch."""
