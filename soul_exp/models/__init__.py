"""Language models: read, checked, wrapped with an adapter, run at answer positions, and saved."""
