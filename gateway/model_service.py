"""ModelService and TokenizerService: the model's description, its tokenizer and template."""

import grpc

from gateway.prompts import detokenize, render, tokenize
from gateway.served_model import ServedModel
from gateway.validate import check_characters, check_messages, check_token_ids
from tandem.api.v1 import model_pb2, model_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from tandem.errors import invalid_field


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Serves the description of the one model."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[self._describe()])

    async def GetModel(self, request: model_pb2.GetModelRequest, context: grpc.aio.ServicerContext) -> model_pb2.GetModelResponse:
        self._model.check_name(request.model)
        return model_pb2.GetModelResponse(model=self._describe())

    def _describe(self) -> model_pb2.Model:
        model = self._model
        return model_pb2.Model(
            name=model.name,
            digest=model.digest,
            tokenizer_digest=model.tokenizer_digest,
            context_tokens=model.context_tokens,
            vocabulary_size=model.vocabulary_size,
            end_token_ids=model.end_token_ids,
            chat_capable=model.template is not None,
        )


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Serves the model's tokenizer."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    async def Tokenize(
        self, request: tokenizer_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.TokenizeResponse:
        self._model.check_name(request.model)
        check_characters(len(request.text), self._model, "text")
        token_ids = await tokenize(request.text, self._model, add_special_tokens=True)
        return tokenizer_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.DetokenizeResponse:
        self._model.check_name(request.model)
        token_ids = tuple(request.token_ids)
        check_token_ids(token_ids, self._model, "token_ids")
        text = await detokenize(token_ids, self._model, skip_special_tokens=request.skip_special_tokens)
        return tokenizer_pb2.DetokenizeResponse(text=text)

    async def ApplyChatTemplate(
        self, request: tokenizer_pb2.ApplyChatTemplateRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.ApplyChatTemplateResponse:
        self._model.check_name(request.model)
        messages = check_messages(request.chat, self._model, "chat")
        if not messages:
            raise invalid_field("chat.messages", "must not be empty")
        text = await render(messages, self._model, add_generation_prompt=not request.omit_generation_prompt)
        token_ids = await tokenize(text, self._model, add_special_tokens=False)
        return tokenizer_pb2.ApplyChatTemplateResponse(text=text, token_ids=token_ids)
