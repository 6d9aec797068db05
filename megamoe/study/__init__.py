"""A ladder of dense models and one of mixtures, trained under equal rules, evaluated, compared by cost."""
