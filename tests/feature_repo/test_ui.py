"""`feast ui`: every version's views with their tags, as its pages get them."""

import json
import re
from typing import Any

import pytest

from pipelines.contracts.embedding_view import EmbeddingView
from tests.releases import FeastRepository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ui(workspace_with_versions: FeastRepository, feast_server: Any) -> Any:
    return feast_server(workspace_with_versions, "/projects-list.json", "ui")


def test_pages_and_their_script_are_served(ui: Any) -> None:
    status, page = ui.get("/p/facet/feature-view/item_kge__v2")
    assert status == 200 and "<title>Feast Feature Store</title>" in page
    status, script = ui.get(re.search(r'src="(/static/js/[^"]+)"', page)[1])
    assert status == 200 and len(script) > 100_000
    assert [project["id"] for project in json.loads(ui.get("/projects-list.json")[1])["projects"]] == ["facet"]


def test_each_versions_views_are_shown_with_their_tags(ui: Any, workspace_with_versions: FeastRepository) -> None:
    status, text = ui.get("/api/v1/feature_views?project=facet")
    assert status == 200
    shown = {view["spec"]["name"]: view for view in json.loads(text)["featureViews"]}
    manifests = workspace_with_versions.workspace.versions.manifests()
    for manifest in manifests:
        for spec in manifest.tables:
            view = shown.pop(spec.view_name(manifest.version))
            assert view["spec"]["tags"] == EmbeddingView.of(manifest, spec).tags(manifest)
            assert view["spec"]["features"] == [{"name": "row", "valueType": "BYTES"}]
            assert view["meta"]["state"] == "AVAILABLE_ONLINE"
    assert len(manifests) == 2 and set(shown) == {"user_context", "item_context", "user_item_context"}


def test_one_view_and_the_services(ui: Any, workspace_with_versions: FeastRepository) -> None:
    view = json.loads(ui.get("/api/v1/feature_views/item_kge__v2?project=facet")[1])
    assert view["spec"]["tags"]["manifest_sha256"] == workspace_with_versions.workspace.versions.manifest(2).sha256
    services = json.loads(ui.get("/api/v1/feature_services?project=facet")[1])["featureServices"]
    used = {
        service["spec"]["name"]: {view["featureViewName"] for view in service["spec"]["features"]}
        for service in services
    }
    assert set(used) == {"context", "ranker_v1", "ranker_v2"}
    assert used["ranker_v2"] == {"user_contrastive__v2", "user_kge__v2", "item_contrastive__v2", "item_kge__v2"}
    assert ui.get("/api/v1/feature_views/item_kge__v9?project=facet")[0] == 404
