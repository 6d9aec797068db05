"""A ladder of dense models and one of mixtures, trained under equal rules, evaluated, and compared by what they cost."""
