"""What clients say and hear: OpenAI's JSON, as strict models with bounds, from which the OpenAPI document is made."""
