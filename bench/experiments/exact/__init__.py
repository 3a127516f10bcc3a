"""The second record: problems whose loss and gradient are exact, with budgets in evaluations."""
