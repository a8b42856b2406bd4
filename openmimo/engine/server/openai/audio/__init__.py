"""The endpoints of models that hear and speak: transcription, speech, and chats with sound."""
