"""The Responses API: its requests, its items and events, stored responses, and the WebSocket transport."""
