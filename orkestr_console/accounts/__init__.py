"""People, teams, plans and API tokens: who calls, and what their plan covers."""
