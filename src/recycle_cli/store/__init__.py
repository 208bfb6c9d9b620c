"""The door to disk: adapter folders, their vetting, the adapter cache and the catalog."""
