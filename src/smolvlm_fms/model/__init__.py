"""The models: vision tower, connector and text backbone put together."""
