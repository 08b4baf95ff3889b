"""How many engines a model needs: observed, forecast, decided with reasons, and made so."""
