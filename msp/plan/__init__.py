"""Units, budgets, levels, rules and recipes."""
