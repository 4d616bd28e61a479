"""What a ranker asks for: `ranker_v<N>` gives all rows of version N, `context` everything that is not learned."""

from context_views import item_context, user_context, user_item_context
from embedding_views import views_by_version
from feast import FeatureService

__all__ = ["context"]

context = FeatureService(
    name="context", features=[user_context, item_context, user_item_context], description="activity of users and items"
)

globals().update(
    {
        f"ranker_v{version}": FeatureService(
            name=f"ranker_v{version}", features=views, description=f"all tables of version {version}"
        )
        for version, views in views_by_version.items()
    }
)
